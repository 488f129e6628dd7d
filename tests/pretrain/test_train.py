"""The training loop: asked to stop it saves first; a step without a finite gradient is left out; it ends when it should."""

from __future__ import annotations

import math
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from pretrain.errors import Exit
from tests.distributed import start_python
from tests.pretrain import running
from tests.pretrain.running import train
from tests.training import write_config


def touch_in_step(count: int, stop: Path) -> None:
    from pretrain import interrupt

    interrupt.LOOK = 0.0
    running.at_step(count, stop.touch)


@pytest.mark.parametrize("wish", [signal.SIGINT, signal.SIGTERM, "the file"], ids=str)
def test_asked_to_stop_it_saves_that_step_and_says_how_to_go_on(
    tmp_path: Path, tiny_data: Path, wish: signal.Signals | str
) -> None:
    run = tmp_path / "run"
    by_file = partial(touch_in_step, 5, run / "stop")
    fault = by_file if isinstance(wish, str) else partial(running.signal_in_step, 5, wish)
    ran = train(tmp_path, tiny_data, fault=fault)
    assert ran.code == Exit.STOPPED and "Traceback" not in ran.told, ran.told
    assert running.steps_of(run)[-1] == 5
    assert f"python -m pretrain train {run}" in ran.out and "stopped after step 5" in ran.out
    assert running.command("train", run).code == 0
    assert train(tmp_path / "whole", tiny_data).code == 0
    running.assert_same_run(tmp_path / "whole" / "run", run)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, tiny_data: Path) -> None:
    ran = train(tmp_path, tiny_data, fault=partial(running.signal_in_step, 6, signal.SIGINT, signal.SIGINT))
    assert ran.code == 130 and "Traceback" not in ran.told, ran.told
    assert running.steps_of(tmp_path / "run") in ([3], [3, 4])  # the save of step 4 may yet be under way
    assert [line["step"] for line in running.lines_of(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4, 5]


def test_a_ctrl_c_from_outside_reaches_a_real_command(tmp_path: Path, tiny_data: Path) -> None:
    long = ("schedule.total=1000000 steps", "monitor.validate_every=null", "checkpoint.every=1000000 steps")
    with start_python(["pretrain", "train", write_config(tmp_path, tiny_data), *running.SHORT, *long]) as process:
        assert process.stdout is not None
        told = ""
        while "step 3/" not in told:
            line = process.stdout.readline()
            assert line, f"it ended too soon:\n{told}"
            told += line
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == Exit.STOPPED and err == "", out + err
    [step] = running.steps_of(tmp_path / "run")
    assert f"stopped after step {step}, which is saved" in out
    assert [line["step"] for line in running.lines_of(tmp_path / "run") if "loss" in line] == list(range(1, step + 1))


# -- steps that are not applied --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "compute", "value"),
    [(0, "fp32", math.nan), (0, "bf16", math.inf), (1, "fp32", math.nan), (1, "fp32", math.inf), (1, "bf16", math.nan)],
)
def test_a_step_without_a_finite_gradient_is_skipped_said_and_counted(
    tmp_path: Path, tiny_data: Path, zero: int, compute: str, value: float
) -> None:
    """Steps 5 and 6: weights and both moments stay the very bits they were; step 7 trains on."""
    options = (f"parallel.zero={zero}", f"precision.compute={compute}", "checkpoint={every: 1 steps, keep_last: 99}")
    ran = train(tmp_path, tiny_data, *options, fault=partial(running.poison_steps, 5, 2, value))
    run = tmp_path / "run"
    assert ran.code == 0 and "Traceback" not in ran.told, ran.told
    assert ran.out.count("the step is skipped") == 2
    assert "step 6: no finite gradient norm" in ran.out and "(2 in a row, the run stops at 5)" in ran.out
    before = running.tensors_of(run, 4)
    for step in (5, 6):
        for name, tensor in running.tensors_of(run, step).items():
            assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), f"{name} at step {step}"
    assert not all(torch.equal(tensor, before[name]) for name, tensor in running.tensors_of(run, 7).items())
    states = [running.manifest_of(run, step)["state"] for step in (4, 5, 6, 7)]
    assert [state["updates"] for state in states] == [4, 4, 4, 5]
    assert [state["bad_steps"] for state in states] == [0, 1, 2, 0]
    assert [state["samples"] for state in states] == [18, 24, 30, 38], "a skipped step's samples are consumed"
    lines = {line["step"]: line for line in running.lines_of(run) if "loss" in line}
    assert lines[5]["loss"] is None and lines[5]["grad_norm"] is None, "JSON has no NaN"
    assert math.isfinite(lines[7]["loss"])


def test_too_many_such_steps_in_a_row_end_the_run(tmp_path: Path, tiny_data: Path) -> None:
    fault = partial(running.poison_steps, 6, 99, math.nan)
    ran = train(tmp_path, tiny_data, "run.max_bad_steps=3", fault=fault)
    assert ran.code == Exit.DIVERGED and "Traceback" not in ran.told, ran.told
    assert "stopped at step 8: 3 steps in a row had no finite gradient" in ran.out
    assert "optimizer.learning_rate" in ran.out
    import json

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reason"] == "diverged" and summary["step"] == 8 and summary["loss"] is None
    again = running.command("train", tmp_path / "run")
    assert again.code == Exit.DIVERGED and "stopped at step 8" in again.out, again.told


@pytest.mark.parametrize("zero", [0, 1])
def test_skipped_steps_are_counted_when_a_step_is_logged(tmp_path: Path, tiny_data: Path, zero: int) -> None:
    """Between two logged steps nothing asks the device. Steps 2, 3 and 9 to the end are bad; read are 5, 10 and 12."""
    options = (f"parallel.zero={zero}", "monitor.log_every=5 steps", "monitor.validate_every=null")
    rare = (*options, "checkpoint.every=100 steps", "run.max_bad_steps=3")
    ran = train(tmp_path, tiny_data, *rare, "batch.micro_size=1", fault=_poison_twice, world=1 + zero)
    assert ran.code == Exit.DIVERGED and "Traceback" not in ran.told, ran.told
    assert "step 5: no finite gradient norm, 2 of the last 5 steps are skipped (0 in a row" in ran.out
    assert "step 10: no finite gradient norm, 2 of the last 5 steps are skipped (2 in a row" in ran.out
    assert "stopped at step 12: 4 steps in a row had no finite gradient" in ran.out
    state = running.manifest_of(tmp_path / "run", 12)["state"]
    assert (state["updates"], state["bad_steps"]) == (6, 4)


def _poison_twice() -> None:
    running.poison_steps(2, 2, math.nan)
    running.poison_steps(9, 99, math.inf)


def test_an_absurd_learning_rate_ends_with_a_message_and_not_with_a_traceback(tmp_path: Path, tiny_data: Path) -> None:
    options = ("optimizer.learning_rate=1e30", "run.max_bad_steps=2", "monitor.validate_every=1 steps")
    ran = train(tmp_path, tiny_data, *options, "monitor.tensorboard=true")
    assert ran.code == Exit.DIVERGED and "Traceback" not in ran.told, ran.told
    assert "2 steps in a row had no finite gradient" in ran.out
    best = running.manifest_of(tmp_path / "run", running.steps_of(tmp_path / "run")[-1])["state"]["best_loss"]
    assert math.isfinite(best) and running.lines_of(tmp_path / "run")


# -- endings ---------------------------------------------------------------------------------------------------------


def test_it_stops_early_when_validation_does_not_improve(tmp_path: Path, tiny_data: Path) -> None:
    """patience 2: the losses at 0, 2, ... improve up to step 4; 6 and 8 do not, equal is not better. A restart between
    the two counts on."""
    options = ("monitor.validate_every=2 steps", "monitor.patience=2")
    stop = partial(_script_and_stop, (9.0, 8.0, 7.0, 7.0), 6)
    assert train(tmp_path, tiny_data, *options, fault=stop).code == Exit.STOPPED
    ran = train(tmp_path, tiny_data, *options, fault=partial(running.script_validations, 7.5))
    assert ran.code == 0 and "stopped early at step 8" in ran.out, ran.told
    assert "7.0000 at step 4" in ran.out
    assert running.steps_of(tmp_path / "run")[-1] == 8
    again = running.command("train", tmp_path / "run")
    assert again.code == 0 and "stopped early at step 8" in again.out, again.told


def _script_and_stop(losses: tuple[float, ...], step: int) -> None:
    running.script_validations(*losses)
    running.signal_in_step(step, signal.SIGTERM)


@pytest.mark.parametrize(
    ("every", "expected"),
    [("5 steps", [0, 5, 10, 12]), ("1000 tokens", [0, 7, 11, 12]), ("null", [0, 12])],
)
def test_validations_come_when_asked_and_at_both_ends(
    tmp_path: Path, tiny_data: Path, every: str, expected: list[int]
) -> None:
    """Tokens: 1,000 are passed in step 7 (38 sequences of 32), 2,000 in step 11 (70)."""
    assert train(tmp_path, tiny_data, f"monitor.validate_every={every}").code == 0
    assert [line["step"] for line in running.lines_of(tmp_path / "run") if "validation_loss" in line] == expected


@pytest.mark.parametrize("layout", ["parallel.pipeline=2", "parallel={tensor: 2, sequence: true}"])
def test_texts_that_no_process_can_make_are_warned_of_once(tmp_path: Path, tiny_data: Path, layout: str) -> None:
    ran = train(tmp_path, tiny_data, layout, "monitor.sample_every=2 steps", world=2)
    assert ran.code == 0, ran.told
    assert ran.out.count("warning: monitor.sample_every has no effect under") == 1
    assert "a text by the model" not in ran.out
