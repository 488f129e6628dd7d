"""A run that was killed anywhere, started again, equals one that was not: weights, moments, every logged number."""

from __future__ import annotations

import functools
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from pretrain.errors import Exit
from tests.distributed import run_python, start_python
from tests.pretrain import running
from tests.pretrain.running import Fault, assert_same_run, train, train_killed
from tests.training import write_config

BOARD = "monitor.tensorboard=true"


@functools.cache
def uninterrupted(shards: Path, *overrides: str) -> Path:
    """A run to compare with, made once."""
    folder = shards.parent / f"uninterrupted-{abs(hash(overrides))}"
    ran = train(folder, shards, BOARD, *overrides, timeout=240)
    assert ran.code == 0, ran.told
    return folder / "run"


@pytest.mark.parametrize(("zero", "compute"), [(0, "fp32"), (1, "fp32"), (1, "bf16")])
def test_a_run_killed_in_a_step_goes_on_bitwise(tmp_path: Path, tiny_data: Path, zero: int, compute: str) -> None:
    """From step 4's checkpoint: across a step of the batch-size ramp (6 to 8 at step 7) and the validation at step 8."""
    options = (f"parallel.zero={zero}", f"precision.compute={compute}")
    train_killed(tmp_path, tiny_data, BOARD, *options, fault=partial(running.kill_in_step, 6))
    assert running.steps_of(tmp_path / "run") == [3, 4]
    ran = train(tmp_path, tiny_data, BOARD, *options)
    assert ran.code == 0 and "going on after step 4" in ran.out, ran.told
    assert_same_run(uninterrupted(tiny_data, *options), tmp_path / "run")


@pytest.mark.thorough
@pytest.mark.slow
def test_a_compiled_run_killed_in_a_step_goes_on_bitwise(tmp_path: Path, tiny_data: Path) -> None:
    """torch.compile makes the same code again, whatever batch size or validation the process began with."""
    options = ("precision.compile=always", "model.num_layers=1", "model.dropout=0.0")
    train_killed(tmp_path, tiny_data, BOARD, *options, fault=partial(running.kill_in_step, 6), timeout=240)
    ran = train(tmp_path, tiny_data, BOARD, *options, timeout=240)
    assert ran.code == 0 and "going on after step 4" in ran.out and ", compiled," in ran.out, ran.told
    assert list(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "headers").glob("*.gch")), "not in the shared /tmp"
    assert_same_run(uninterrupted(tiny_data, *options), tmp_path / "run")


@pytest.mark.parametrize(
    ("fault", "kept"),
    [
        (partial(running.kill_in_tensors, 3), [3, 4]),
        (partial(running.kill_in_manifest, 3), [3, 4]),
        (partial(running.kill_before_rename, 3), [3, 4]),
        (partial(running.kill_in_tensors, 1), []),
        (running.kill_in_removal, [4, 6]),
    ],
    ids=["tensors", "manifest", "rename", "first checkpoint", "removal of an old one"],
)
def test_a_run_killed_in_a_save_goes_on_bitwise(tmp_path: Path, tiny_data: Path, fault: Fault, kept: list[int]) -> None:
    run = tmp_path / "run"
    train_killed(tmp_path, tiny_data, BOARD, fault=fault)
    assert running.steps_of(run) == kept
    assert list((run / "checkpoints").glob(".step-*.partial")), "the kill did not land where it should"
    ran = train(tmp_path, tiny_data, BOARD)
    assert ran.code == 0 and "damaged" not in ran.told, ran.told
    assert_same_run(uninterrupted(tiny_data), run)


def test_a_real_command_killed_from_outside_goes_on_bitwise(tmp_path: Path, tiny_data: Path) -> None:
    """Wherever the kill lands: `python -m pretrain train` by itself, started again from the run's folder alone."""
    config, extra = write_config(tmp_path, tiny_data), ("schedule.total=80 steps", "monitor.validate_every=100 steps")
    with start_python(["pretrain", "train", config, *running.SHORT, *extra]) as process:
        assert process.stdout is not None
        told = ""
        while "step 9/80" not in told:
            line = process.stdout.readline()
            assert line, f"it ended too soon:\n{told}"
            told += line
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert running.steps_of(tmp_path / "run")[-1] < 80
    again = run_python(["pretrain", "train", tmp_path / "run"])
    assert again.returncode == 0 and "going on after step" in again.stdout, again.stdout + again.stderr
    assert again.stderr == ""
    assert train(tmp_path / "whole", tiny_data, *extra).code == 0
    assert_same_run(tmp_path / "whole" / "run", tmp_path / "run")


def test_a_run_killed_on_one_rank_and_stopped_on_two_has_the_same_batches(tmp_path: Path, tiny_data: Path) -> None:
    """Two ranks take over where one was killed, and one where they were stopped: the same data, so nearly the losses.
    Asked in step 7, the two agree on it as the next step begins, and save that."""
    options = ("parallel.zero=1", "precision.compute=fp32")
    train_killed(tmp_path, tiny_data, *options, "batch.micro_size=1", fault=partial(running.kill_in_step, 5))
    stop = partial(running.signal_in_step, 3, signal.SIGTERM)
    ran = train(tmp_path, tiny_data, *options, "batch.micro_size=1", world=2, fault=stop)
    assert ran.code == Exit.STOPPED and running.steps_of(tmp_path / "run") == [6, 8], ran.told
    assert train(tmp_path, tiny_data, *options, "batch.micro_size=1").code == 0
    ours, theirs = (running.numbers_of(run) for run in (tmp_path / "run", uninterrupted(tiny_data, *options)))
    assert [line.get("batch_hash") for line in ours] == [line.get("batch_hash") for line in theirs]
    losses = [line["loss"] for line in theirs if "loss" in line]
    assert [line["loss"] for line in ours if "loss" in line] == pytest.approx(losses, rel=1e-5)


def test_metrics_and_tensorboard_hold_each_step_once(tmp_path: Path, tiny_data: Path) -> None:
    """Two kills, each some steps after a checkpoint: what was reported beyond it is taken back, nothing before is lost."""
    run = tmp_path / "run"
    for step, on_disk in ((6, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5, 6, 7, 8])):
        train_killed(tmp_path, tiny_data, BOARD, fault=partial(running.kill_in_step_with_lazy_board, step))
        reported = [line["step"] for line in running.lines_of(run) if "loss" in line]
        assert reported[: len(on_disk)] == on_disk and len(reported) == len(set(reported))
        assert [at for at, _ in running.scalars_of(run)["loss/train"]][: len(on_disk)] == on_disk, "lost with the kill"
    assert train(tmp_path, tiny_data, BOARD).code == 0
    whole = uninterrupted(tiny_data)
    assert [line["step"] for line in running.lines_of(run) if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in running.lines_of(run) if "validation_loss" in line] == [0, 4, 8, 12]
    ours, theirs = running.scalars_of(run), running.scalars_of(whole)
    assert ours.keys() == theirs.keys()
    for tag in (
        "loss/train",
        "optimizer/grad_norm",
        "optimizer/learning_rate",
        "optimizer/batch_size",
        "optimizer/epochs",
    ):
        assert ours[tag] == theirs[tag]
    assert ours["loss/validation"] == theirs["loss/validation"]


def test_an_unfinished_line_of_metrics_is_cut_off(tmp_path: Path, tiny_data: Path) -> None:
    """As a machine that lost its power may leave it."""
    train_killed(tmp_path, tiny_data, fault=partial(running.kill_in_step, 6))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "tok')
    assert train(tmp_path, tiny_data).code == 0
    assert running.numbers_of(tmp_path / "run") == running.numbers_of(uninterrupted(tiny_data))


def test_a_finished_run_started_again_says_so_and_changes_nothing(tmp_path: Path, tiny_data: Path) -> None:
    assert train(tmp_path, tiny_data, BOARD).code == 0
    before = running.content_of(tmp_path / "run")
    again = running.command("train", tmp_path / "run")
    assert again.code == 0 and "finished: 12 steps" in again.out and "schedule.total" in again.out, again.told
    assert running.content_of(tmp_path / "run") == before


def test_a_finished_run_goes_on_where_its_schedule_is_made_longer(tmp_path: Path, tiny_data: Path) -> None:
    """And the rate of a constant schedule being the same, it equals the run that was as long from the first."""
    constant = "schedule.kind=constant"
    assert train(tmp_path, tiny_data, constant, "schedule.total=6 steps").code == 0
    ran = running.command("train", tmp_path / "run", "schedule.total=12 steps")
    assert ran.code == 0 and "going on after step 6" in ran.out, ran.told
    whole = uninterrupted(tiny_data, constant)
    running.assert_same_checkpoint(whole, tmp_path / "run", 12)
    assert [line for line in running.numbers_of(tmp_path / "run") if "loss" in line] == [
        line for line in running.numbers_of(whole) if "loss" in line
    ]


def test_a_run_goes_on_from_its_folder_alone_wherever_that_was_moved(tmp_path: Path, tiny_data: Path) -> None:
    train_killed(tmp_path, tiny_data, BOARD, fault=partial(running.kill_in_step, 6))
    moved = tmp_path / "elsewhere"
    (tmp_path / "run").rename(moved)
    ran = running.command("train", moved)
    assert ran.code == 0 and "going on after step 4" in ran.out, ran.told
    assert_same_run(uninterrupted(tiny_data), moved)


@pytest.mark.parametrize("change", ["batch.micro_size=1", "monitor.log_every=5 steps", "checkpoint.every=5 steps"])
def test_what_decides_no_number_may_change_on_resume(tmp_path: Path, tiny_data: Path, change: str) -> None:
    train_killed(tmp_path, tiny_data, fault=partial(running.kill_in_step, 6))
    assert train(tmp_path, tiny_data, change).code == 0
    ours, theirs = (running.tensors_of(run, 12) for run in (tmp_path / "run", uninterrupted(tiny_data)))
    for name, value in ours.items():
        assert (value - theirs[name]).norm() <= 1e-5 * max(theirs[name].norm(), 1e-3), name
