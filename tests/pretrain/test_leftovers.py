"""However a run ends, nothing of it stays in shared memory, and no process that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import RankError, run_ranks
from tests.pretrain import running
from tests.training import write_config

SHARED = Path("/dev/shm")
MARK = "LEFTOVERS_OF"


def held() -> set[str]:
    """Files of shared memory that a living process has open or mapped."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.update(word for word in (process / "maps").read_text().split() if word.startswith(f"{SHARED}/"))
            found.update(os.readlink(link) for link in (process / "fd").iterdir())
    return found


def orphans() -> set[str]:
    return {str(path) for path in SHARED.iterdir()} - held()


def marked(mark: str) -> Iterator[int]:
    """Living processes that inherited the mark."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}" in (process / "environ").read_text(errors="replace").split("\0"):
                yield int(process.name)


def end(how: str) -> None:
    """On rank 1, in its second step."""
    from parallel.sharded import DeepSpeedEngine

    def act(*_: Any) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        if how == "failed":
            raise ZeroDivisionError
        if how == "leaking":
            (SHARED / f"left-{os.environ[MARK]}").write_bytes(b"x")
            os._exit(9)

    if os.environ["RANK"] == "1":
        running._on_call(DeepSpeedEngine, "step", 2, act)


def run(folder: Path, shards: Path, how: str) -> str:
    """How it ended: each rank's exit code, or what became of the first that failed."""
    arguments = ["train", str(write_config(folder, shards)), *running.SHORT, "batch.micro_size=1", "parallel.zero=2"]
    arguments += ["schedule.total=6 steps", "monitor.validate_every=null", "monitor.validation_samples=8"]
    arguments += [f"parallel.timeout={6 if how == 'failed' else 60}"]
    try:
        return str([int(ran.code) for ran in run_ranks(2, running.run_main, arguments, partial(end, how))])
    except RankError as error:
        return str(error)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of all that a test starts; not of the process that forks ranks, which stays."""
    run_ranks(1, os.getpid)
    word = uuid.uuid4().hex
    monkeypatch.setenv(MARK, word)
    return word


ENDS = {"finished": "[0, 0]", "stopped": "[75, 75]", "failed": "exit code 3", "killed": "killed by signal 9"}


@pytest.mark.parametrize("how", ENDS)
def test_nothing_is_left(tmp_path: Path, tiny_data: Path, how: str, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = orphans()
    assert ENDS[how] in run(tmp_path, tiny_data, how)
    monkeypatch.delenv(MARK)
    left = {path for path in orphans() - before if "/left-" not in path}  # which the test below makes
    assert left == set() and not [*marked(mark)]


def test_what_is_left_would_be_found(tmp_path: Path, tiny_data: Path, mark: str) -> None:
    assert "exit code 9" in run(tmp_path, tiny_data, "leaking")
    try:
        assert f"/dev/shm/left-{mark}" in orphans()
    finally:
        Path(f"/dev/shm/left-{mark}").unlink(missing_ok=True)
