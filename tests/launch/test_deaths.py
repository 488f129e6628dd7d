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
from tests.launch.test_local import alive, wait_until_gone
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
        (signal.SIGKILL, 0, "pipeline=2", 137, "launch: rank 0 was killed by SIGKILL"),
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
    survivor = rf"rank {1 - victim} \(\S+\): step \d+, [a-z -]+: (lost|waited 3 s for) the others \(\w+ in \w+\): "
    assert re.search(rf"^ *{survivor}rank {victim} \(\S+\) did not answer", err, re.MULTILINE), err
    wait_until_gone([*ranks.values()])
    assert not any(map(alive, ranks.values()))
