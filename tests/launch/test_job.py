"""What a job of Slurm's decides when its step has ended: to be requeued, to leave the rest to the next of a chain, or to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.jobs import CONFIG, LAYOUT, SIZE, Slurm, events, launched

LEAVE = "kill -USR1 $PPID; while [[ ! -e $RUN/stop ]]; do sleep 0.05; done; save {0}; exit 75"


@pytest.mark.parametrize(
    ("step", "code", "why", "follows"),
    [
        ("exit 0", 0, "finished", "none"),
        ("exit 2", 2, "a mistake", "none"),
        ("exit 4", 4, "diverged", "none"),
        ("save 00000005; exit 75", 75, "asked to stop", "none"),
        (LEAVE.format("00000005"), -9, "time limit", "requeue"),
        ("exit 137", -9, "failed", "requeue"),
        ("exit 3", -9, "failed", "requeue"),
        ('echo CANCELLED >"$FAKE/state"; exit 75', 75, "ended by Slurm", "slurm"),
        ('echo CANCELLED >"$FAKE/state"; exit 1', 1, "ended by Slurm", "slurm"),
    ],
)
def test_the_steps_exit_code_says_what_is_next(
    slurm: Slurm, run: Path, step: str, code: int, why: str, follows: str
) -> None:
    assert slurm.attempt(run, step) == code, slurm.told
    [end] = events(run, "end")
    assert (end["why"], end["next"]) == (why, follows), slurm.told
    assert slurm.requeued == (follows == "requeue")
    assert not (run / "stop").exists(), "the next attempt would be asked too"


def test_a_time_limit_that_comes_before_all_is_saved_is_noted(slurm: Slurm, run: Path) -> None:
    """Slurm signals whatever the script has started, what asks the run to stop too."""
    ends = 'for child in $(cat /proc/$PPID/task/$PPID/children); do ((child == $$)) || kill "$child"; done'
    step = f'kill -USR1 $PPID; while [[ ! -e $RUN/stop ]]; do sleep 0.05; done; {ends}; echo TIMEOUT >"$FAKE/state"; exit 143'
    assert slurm.attempt(run, step) == 143
    [end] = events(run, "end")
    assert (end["why"], end["next"]) == ("ended by Slurm", "slurm"), slurm.told


def test_a_job_that_fails_without_a_new_checkpoint_twice_is_over(slurm: Slurm, run: Path) -> None:
    assert slurm.attempt(run, "save 00000003; exit 1") == -9
    assert slurm.attempt(run, "exit 1", restart=1) == -9
    assert slurm.attempt(run, "exit 1", restart=2) == 1
    assert [line["next"] for line in events(run, "end")] == ["requeue", "requeue", "none"]
    assert [line["new"] for line in events(run, "end")] == [3, 0, 0]
    assert "two attempts in a row saved no step" in slurm.told
    assert slurm.attempt(run, "exit 1", restart=3) == 0
    assert "nothing is left to do: failed, and two attempts in a row saved no step\n" in slurm.told


def test_failures_are_bounded_though_each_saves_some_steps(slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "--max-attempts", "3", "run.dir=run") == 0
    codes = [slurm.attempt(run, f"save 0000000{number}; exit 137", restart=number) for number in range(1, 4)]
    assert codes == [-9, -9, 137] and "failed, as 2 attempts before" in slurm.told


def test_attempts_that_the_time_limit_ends_are_not_counted(slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "--max-attempts", "1", "run.dir=run") == 0
    for number in range(1, 4):
        assert slurm.attempt(run, LEAVE.format(f"0000000{number}"), restart=number) == -9, slurm.told


def test_a_time_limit_that_no_step_fits_into_is_a_failure(slurm: Slurm, run: Path) -> None:
    step = LEAVE.format("00000000")
    assert [slurm.attempt(run, step), slurm.attempt(run, step, restart=1)] == [-9, 75], slurm.told


def test_dead_nodes_are_bounded_too(slurm: Slurm, tmp_path: Path) -> None:
    """Their attempts say no end: the script died with the node."""
    run = tmp_path / "run"
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "--max-attempts", "2", "run.dir=run") == 0
    dies = "kill -9 $PPID"
    assert [slurm.attempt(run, dies), slurm.attempt(run, dies, restart=1)] == [-9, -9]
    assert slurm.attempt(run, "exit 0", restart=2) == 1 and "2 attempts failed" in slurm.told


@pytest.mark.parametrize(("saves", "third"), [(True, 143), (False, 1)])
def test_a_preempted_attempt_has_failed_if_it_saved_nothing(
    slurm: Slurm, tmp_path: Path, saves: bool, third: int
) -> None:
    run = tmp_path / "run"
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "--max-attempts", "2", "run.dir=run") == 0
    (slurm.folder / "state").write_text("PREEMPTED")
    steps = [f"{f'save 0000000{number};' if saves else ''} exit 143" for number in range(1, 4)]
    assert [slurm.attempt(run, step, restart=n) for n, step in enumerate(steps)] == [143, 143, third], slurm.told


def test_a_chain_goes_on_in_its_next_job_until_nothing_is_left(slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, "--chain", "3", "run.dir=run") == 0
    assert slurm.attempt(run, LEAVE.format("00000005")) == 75
    assert slurm.attempt(run, "exit 0") == 0 and slurm.attempt(run, "exit 1") == 0
    assert [line["next"] for line in events(run, "end")] == ["chain", "none"] and slurm.requeued == 0


def test_a_cluster_that_forbids_requeue_is_told(slurm: Slurm, run: Path) -> None:
    scontrol = slurm.folder / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text().replace('echo "$2" >>"$FAKE/requeued"; kill -9 $PPID', "exit 1"))
    assert slurm.attempt(run, "exit 1") == 1 and "submit with --chain N" in slurm.told
