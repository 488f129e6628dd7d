"""`python -m launch local` when one of its ranks is killed or stopped in the middle of training: it ends by itself, soon,
with an exit code that is not 0, and says which rank it was and what the others waited in."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed import start_python
from tests.launch.test_local import SUPERVISE, WAITS, alive, supervise, wait_until_gone
from tests.training import write_config

TIMEOUT = 3.0  # seconds, of the runs
SPARE = 8.0  # seconds more: the ranks find out who it was (about four), on a busy machine


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Process id of each rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        found[int(next(word for word in variables if word.startswith("RANK=")).partition("=")[2])] = int(child)
    return found


def wait_for_steps(launcher: subprocess.Popen[str], run: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline, "no step in a minute"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "victim", "layout", "code", "how"),
    [
        (signal.SIGKILL, 1, "zero=1", 137, "launch: rank 1 was killed by SIGKILL"),
        pytest.param(
            *(signal.SIGKILL, 0, "pipeline=2", 137, "launch: rank 0 was killed by SIGKILL"), marks=pytest.mark.thorough
        ),
        (signal.SIGSTOP, 0, "zero=0", 3, "launch: rank 1 gave up waiting for another; ended, since stopped"),
    ],
    ids=["kill 1", "kill 0", "stop 0"],
)
def test_a_rank_that_dies_or_hangs_ends_the_run_and_is_named(
    tmp_path: Path, tiny_data: Path, number: signal.Signals, victim: int, layout: str, code: int, how: str
) -> None:
    path = write_config(tmp_path, tiny_data, **{"total: 10 steps": "total: 1000000 steps"})
    overrides = [f"parallel.{layout}", f"parallel.timeout={TIMEOUT}", "batch.micro_size=2"]
    with start_python(["launch", "local", path, "--processes", "2", *overrides]) as launcher:
        wait_for_steps(launcher, tmp_path / "run", 3)
        ranks = ranks_of(launcher)
        os.kill(ranks[victim], number)
        started = time.monotonic()
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code, err
    assert time.monotonic() - started < SPARE + (TIMEOUT if number == signal.SIGSTOP else 0.0)
    assert how in err and "Traceback" not in err and "Exception raised from" not in err
    waited = r"\w+ in \w+|in _await_all_reduce"
    survivor = rf"rank {1 - victim} \(\S+\): step \d+, [a-z -]+: (lost|waited 3 s for) the others \(({waited})\): "
    assert re.search(rf"^ *(\S+Z )?{survivor}rank {victim} \(\S+\) did not answer", err, re.MULTILINE), err
    wait_until_gone([*ranks.values()])
    assert not any(map(alive, ranks.values()))


def patient(folder: Path, script: str) -> str:
    """What the launcher says of two ranks; it would give the second a minute after the first has failed."""
    (folder / "supervise.py").write_text(SUPERVISE.replace("GRACE_SECONDS = 1.0", "GRACE_SECONDS = 60.0"))
    with supervise(folder, WAITS + script, 2) as launcher:
        _, err = launcher.communicate(timeout=30)
    return f"{launcher.returncode}: {err}"


def test_a_stopped_rank_that_was_given_up_is_not_waited_for(tmp_path: Path) -> None:
    script = """
if rank == "1": os.kill(os.getpid(), signal.SIGSTOP)
while not os.path.exists("up-1") or " T " not in open(f"/proc/{open('up-1').read()}/stat").read(): time.sleep(0.01)
sys.exit(3)
"""
    said = patient(tmp_path, script)
    assert said.startswith("3: ") and "ended, since stopped (by SIGSTOP or a debugger): 1" in said


def test_a_rank_that_failed_is_told_though_another_gave_it_up_before(tmp_path: Path) -> None:
    script = """
if rank == "0":
    while not os.path.exists("up-1"): time.sleep(0.01)
    sys.exit(3)
while not os.path.exists("up-0"): time.sleep(0.01)
while os.path.exists(f"/proc/{open('up-0').read()}"): time.sleep(0.01)  # until the launcher has seen it end
sys.exit("the disk has gone")
"""
    said = patient(tmp_path, script)
    assert said.startswith("1: ") and "rank 1 ended with exit code 1" in said and "the disk has gone" in said
