"""`train --profile`, run as a user does: where the time went, a trace that says the same, and the same training."""

from __future__ import annotations

import gzip
import json
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import Exit
from tests.distributed import run_python
from tests.pretrain import running
from tests.pretrain.running import assert_refused, assert_same_run, command, train
from tests.training import write_config

PARTS = ("data", "forward", "backward", "communication", "optimizer", "Python (rest)")
QUICK = ("monitor.validate_every=null", "monitor.validation_samples=4", "checkpoint.every=1000 steps")


def rows_of(told: str) -> dict[str, list[float]]:
    """The table: milliseconds and percent of each part and of the step; of several ranks the least and the most too."""
    [table] = re.findall(r"where a step's time goes.*?(?=the 10 longest operators)", told, re.DOTALL)
    rows = re.findall(rf"^  ({'|'.join(map(re.escape, (*PARTS, 'step')))}) +([\d.,% ]+)$", table, re.MULTILINE)
    return {name: [float(word.strip("%").replace(",", "")) for word in words.split()] for name, words in rows}


def assert_sums_to_the_step(rows: dict[str, list[float]]) -> None:
    assert list(rows) == [*PARTS, "step"]
    assert sum(rows[part][0] for part in PARTS) == pytest.approx(rows["step"][0], abs=0.04)  # as rounded
    assert sum(rows[part][1] for part in PARTS) == pytest.approx(100, abs=0.4)


def ranges_of(run: Path, rank: int) -> dict[str, list[tuple[float, float]]]:
    """The named ranges of a rank's trace, in microseconds, read as what the viewers read."""
    found: dict[str, list[tuple[float, float]]] = {}
    with gzip.open(run / "tensorboard" / f"rank-{rank}.4.pt.trace.json.gz") as file:
        for event in json.load(file)["traceEvents"]:
            if event.get("cat") == "user_annotation":
                found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def within(inner: tuple[float, float], outer: list[tuple[float, float]]) -> bool:
    return any(start <= inner[0] and inner[1] <= end for start, end in outer)


# -- what it tells ---------------------------------------------------------------------------------------------------


def mark_validations() -> None:
    from torch.profiler import record_function

    from pretrain.validation import Validation

    original = Validation.run

    def run(*args: Any) -> Any:
        with record_function("validation"):
            return original(*args)

    Validation.run = run  # type: ignore[method-assign]


def test_a_profiled_run_trains_the_same_and_its_steps_hold_all_passes_but_the_validations(
    tmp_path: Path, tiny_data: Path
) -> None:
    """Steps 4 to 8 of 12, of 2, 3 and 4 micro-batches of 2; validations behind 4 and 8."""
    plain = train(tmp_path / "plain", tiny_data)
    ran = train(tmp_path / "profiled", tiny_data, "--profile", fault=mark_validations)
    assert (plain.code, ran.code, ran.err) == (0, 0, "")
    run = tmp_path / "profiled" / "run"
    assert_same_run(tmp_path / "plain" / "run", run)
    assert "(mean of steps 4 to 8; the profiler's own cost is in it)" in ran.out
    rows = rows_of(ran.out)
    assert_sums_to_the_step(rows)
    assert rows["communication"][0] == 0
    assert all(rows[part][0] > 0 for part in PARTS if part != "communication")
    ranges = ranges_of(run, 0)
    steps = ranges["pretrain: step"]
    assert sum(end - start for start, end in steps) / 5e3 == pytest.approx(rows["step"][0], abs=0.02)
    inside = {name: sum(within(one, steps) for one in found) for name, found in ranges.items()}
    micro_batches = sum(size // 2 for size in (6, 6, 6, 8, 8))
    assert len(steps) == inside["pretrain: data"] == inside["pretrain: optimizer"] == 5
    assert inside["pretrain: forward"] == inside["pretrain: backward"] == micro_batches
    assert len(ranges["validation"]) >= 1 and inside["validation"] == 0
    assert len(ranges["pretrain: forward"]) > micro_batches, "the validation's passes are in the trace, not in a step"
    listed = re.findall(r"^  (\S.*?) +([\d.,]+) +[\d,]+$", ran.out.split("longest operators")[1], re.MULTILINE)
    times = [float(time.replace(",", "")) for _, time in listed]
    assert len(listed) == 10 and times == sorted(times, reverse=True) and times[0] > 0
    assert sum(name.startswith("aten::") for name, _ in listed) >= 5, "what the tensors were computed with"
    assert f" MB: {run / 'tensorboard' / 'rank-0.4.pt.trace.json.gz'}; open it in https://ui.perfetto.dev" in ran.out


PLANTED = {
    "data": 0.04,
    "forward": 0.06,
    "backward": 0.08,
    "communication": 0.1,
    "optimizer": 0.12,
    "Python (rest)": 0.14,
}


def slow_everywhere() -> None:
    """Every part of a step takes longer by what PLANTED says: a micro-batch a step, one sum of gradients in its backward
    pass."""
    from torch._C._distributed_c10d import Work

    from parallel.averaging import Averaging
    from parallel.replicated import PlainEngine
    from parallel.stages import Stage
    from pretrain.train import Run

    def slow(owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            time.sleep(PLANTED[part])
            return original(*args, **options)

        setattr(owner, name, call)

    slow(Run, "_step_data", "data")
    slow(Stage, "forward", "forward")
    slow(Averaging, "_ready", "backward")  # for each parameter, so more than once
    slow(Work, "wait", "communication")
    slow(PlainEngine, "step", "optimizer")
    slow(Run, "advance", "Python (rest)")


@pytest.mark.thorough
def test_what_takes_long_is_found_in_its_part(tmp_path: Path, tiny_data: Path) -> None:
    options = (*QUICK, "batch={size: 2, micro_size: 1}", "schedule.total=4 steps", "model.num_layers=1", "--profile=1")
    ran = train(tmp_path, tiny_data, *options, fault=slow_everywhere, world=2)
    assert ran.code == 0, ran.told
    rows = rows_of(ran.out)
    assert_sums_to_the_step(rows)
    for part, seconds in PLANTED.items():
        assert rows[part][2] >= seconds * 1e3, (part, rows)  # on the rank with the least, too


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("axis", "micro_size"), [("tensor", 4), ("pipeline", 1)], ids=["tensor parallel", "pipeline parallel"]
)
def test_several_processes_tell_of_all_and_each_writes_its_trace(
    tmp_path: Path, tiny_data: Path, axis: str, micro_size: int
) -> None:
    """Communication lies between a pipeline's passes, and within them under tensors."""
    config = write_config(tmp_path, tiny_data)
    layout = (f"parallel.{axis}=2", f"batch.micro_size={micro_size}")
    options = (*QUICK, "model.num_layers=2", "schedule.total=6 steps", "--profile", "2", *layout)
    code, out, err = command("train", config, *options, world=2)
    assert code == 0, err
    assert "(mean of steps 4 to 5, 2 ranks; the profiler's own cost is in it)" in out
    rows = rows_of(out)
    assert_sums_to_the_step(rows)
    assert all(row[2] <= row[0] <= row[3] for row in rows.values())
    assert all(rows[part][2] > 0 for part in PARTS)
    assert "profiler_start" not in err
    for rank in range(2):
        ranges = ranges_of(tmp_path / "run", rank)
        assert len(ranges["pretrain: step"]) == 2
        passes = 2 * (8 // micro_size)
        assert [len(ranges[f"pretrain: {name}"]) for name in ("forward", "backward")] == [passes, passes]
        forward = ranges["pretrain: forward"]
        talks = sum(within(one, forward) for one in ranges["pretrain: communication"])
        assert (talks > 0) == (axis == "tensor")


# -- on demand -------------------------------------------------------------------------------------------------------


def traces_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "tensorboard").glob("*.pt.trace.json.gz"))


def make_request(run: str, step: int) -> None:
    """RUN/profile is made in this step, and again in each after it until that is seen no more."""
    from parallel.replicated import PlainEngine
    from pretrain import profile

    profile.LOOK_SECONDS, profile.KEPT, profile.DEFAULT = 0.0, 2, 1
    for count in range(step, step + 11):
        running._on_call(PlainEngine, "step", count, lambda *_: Path(run, "profile").touch())


def test_steps_chosen_by_the_config_are_profiled_once_and_training_stays_the_same(
    tmp_path: Path, tiny_data: Path
) -> None:
    options = (*QUICK, "schedule.total=7 steps")
    assert train(tmp_path / "plain", tiny_data, *options).code == 0
    stop = partial(running.signal_in_step, 2, signal.SIGTERM)
    chosen = ("monitor.profile_steps=[5, 6]",)
    assert train(tmp_path / "profiled", tiny_data, *options, *chosen, fault=stop).code == Exit.STOPPED
    ran = train(tmp_path / "profiled", tiny_data, *options, *chosen)
    assert ran.code == 0 and "(mean of steps 5 to 6; " in ran.out, ran.told
    run = tmp_path / "profiled" / "run"
    assert traces_of(run) == ["rank-0.5.pt.trace.json.gz"]
    with gzip.open(run / "tensorboard" / "rank-0.5.pt.trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("pretrain: step") == 2
    ours, theirs = (running.numbers_of(tmp_path / name / "run") for name in ("plain", "profiled"))
    assert [line.get("loss") for line in ours] == [line.get("loss") for line in theirs]
    again = train(tmp_path / "profiled", tiny_data, *QUICK, "schedule.total=8 steps", *chosen)
    assert again.code == 0 and "mean of steps" not in again.out, "they are over"


def test_a_file_in_a_live_runs_folder_has_the_next_steps_profiled_and_only_the_last_traces_stay(
    tmp_path: Path, tiny_data: Path
) -> None:
    run = tmp_path / "run"
    ran = train(tmp_path, tiny_data, *QUICK, fault=partial(make_request, str(run), 1))
    assert ran.code == 0 and not (run / "profile").exists(), ran.told
    assert f"step 2: {run / 'profile'} was made, steps 4 to 4 are profiled" in ran.out
    profiled = [int(step) for step in re.findall(r"mean of steps (\d+) to", ran.out)]
    assert profiled == [4, 7, 10], "each request waits for the one before"
    assert traces_of(run) == ["rank-0.10.pt.trace.json.gz", "rank-0.7.pt.trace.json.gz"]
    assert "comes too late to profile a step of this run" in ran.out


def test_ranks_profile_the_same_steps_and_one_copy_of_the_model_writes_them(tmp_path: Path, tiny_data: Path) -> None:
    run = tmp_path / "run"
    options = (*QUICK, "batch={size: 4, micro_size: 2}", "schedule.total=5 steps", "parallel.zero=0")
    ran = train(tmp_path, tiny_data, *options, fault=partial(make_request, str(run), 1), world=2)
    assert ran.code == 0 and "(mean of steps 4 to 4, 2 ranks; " in ran.out, ran.told
    assert traces_of(run) == ["rank-0.4.pt.trace.json.gz"]


# -- what keeps it from running --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [("0", "at least 1 step, not 0"), ("x", "'x' is no number of steps"), ("-1", ""), ("2.5", "'2.5' is no number")],
)
@pytest.mark.parametrize("program", ["pretrain", "launch"])
def test_a_wrong_number_of_steps_is_told_by_both_programs(tmp_path: Path, program: str, value: str, words: str) -> None:
    start = (
        ["pretrain", "train", "x.yaml"] if program == "pretrain" else ["launch", "local", "x.yaml", "--processes", "2"]
    )
    result = run_python([*start, f"--profile={value}"], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("error: ") == 1 and "argument --profile: " + words in result.stderr


def test_more_steps_than_the_run_has_are_refused_before_it_starts(tmp_path: Path, tiny_data: Path) -> None:
    ran = train(tmp_path, tiny_data, "--profile=10")
    assert_refused(ran, "--profile: 10 steps after 3 to warm up are 13", "only 12 to go", "give at most 9")
    assert not (tmp_path / "run").exists()


def test_the_steps_must_fit_into_what_is_left_of_a_run_that_goes_on(tmp_path: Path, tiny_data: Path) -> None:
    config, run = write_config(tmp_path, tiny_data), tmp_path / "run"
    short = (*running.SHORT, *QUICK, "schedule={kind: constant, warmup: 2 steps, total: 3 steps}")
    assert command("train", config, *short).code == 0
    before = (run / "metrics.jsonl").read_bytes()
    longer = ("train", config, *short, "schedule.total=7 steps")
    assert_refused(command(*longer, "--profile=2"), "2 steps after 3 to warm up are 5", "only 4 to go", "at most 1")
    assert (run / "metrics.jsonl").read_bytes() == before
    ran = command(*longer, "--profile=1")
    assert ran.code == 0 and "(mean of steps 7 to 7; " in ran.out, ran.told


def test_a_finished_run_says_that_nothing_was_measured(tmp_path: Path, tiny_data: Path) -> None:
    assert train(tmp_path, tiny_data, *QUICK, "schedule.total=6 steps").code == 0
    ran = train(tmp_path, tiny_data, *QUICK, "schedule.total=6 steps", "--profile=2")
    assert ran.code == 0
    assert "nothing is left to do" in ran.out
    assert "warning: --profile: nothing was measured, the run was over before 5 steps were done" in ran.out
    assert not list((tmp_path / "run").rglob("*.pt.trace.*"))


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [
        ("[1, 3]", (), "monitor.profile_steps: [1, 3] is no [first, last]"),
        ("[4, 24]", (), "at most 20 steps"),
        ("[5]", (), "monitor.profile_steps: [5] is no"),
        ("[9, 13]", (), "[9, 13] goes beyond the run's 12 steps"),
        ("[4, 5]", ("--profile=2",), "--profile: monitor.profile_steps names steps too"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused_before_the_run_starts(
    tmp_path: Path, tiny_data: Path, steps: str, options: tuple[str, ...], words: str
) -> None:
    assert_refused(train(tmp_path, tiny_data, f"monitor.profile_steps={steps}", *options), words)
    assert not (tmp_path / "run").exists()


def stop_in_step_5() -> None:
    running.signal_in_step(5, signal.SIGTERM)


def test_a_run_that_is_stopped_meanwhile_saves_and_says_that_nothing_was_measured(
    tmp_path: Path, tiny_data: Path
) -> None:
    ran = train(tmp_path, tiny_data, "--profile", fault=stop_in_step_5)
    assert ran.code == Exit.STOPPED and "stopped after step 5, which is saved" in ran.out, ran.told
    assert "warning: --profile: nothing was measured, the run was over before 8 steps were done" in ran.out
    assert 5 in running.steps_of(tmp_path / "run")
