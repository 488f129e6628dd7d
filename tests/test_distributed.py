"""The tests' own tool: a rank that fails, dies or hangs must be told, and must leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import REPOSITORY, RankError, run_python


def sum_over_ranks(value: float) -> torch.Tensor:
    dist.init_process_group("gloo")
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    return total


def fail_on_rank_two() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 2:
        print("these were its words")
        raise KeyError("lost")
    dist.barrier()


def die_on_rank_one() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


def place() -> tuple[str, str, str, str]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.getcwd(), os.environ.get("MARK", "")


Ranks = Callable[..., list[Any]]


def test_ranks_reach_each_other(ranks: Ranks) -> None:
    assert [result.item() for result in ranks(3, sum_over_ranks, 2.0)] == [12.0, 12.0, 12.0]


def test_ranks_see_the_tests_folder_and_environment(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARK", "here")
    assert ranks(2, place) == [("0", "2", str(tmp_path), "here"), ("1", "2", str(tmp_path), "here")]


def test_exception_of_the_failing_rank_is_raised_with_its_traceback_and_output(ranks: Ranks) -> None:
    with pytest.raises(KeyError, match="lost") as caught:
        ranks(4, fail_on_rank_two)
    notes = "".join(caught.value.__notes__)
    assert "rank 2" in notes and "in fail_on_rank_two" in notes and "these were its words" in notes


def test_killed_rank_is_named_and_the_others_end(ranks: Ranks) -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1: the process was killed by signal 9"):
        ranks(3, die_on_rank_one)
    assert time.monotonic() - started < 20


def test_hanging_rank_is_named_after_the_timeout(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1: not done after 2\.0 seconds"):
        ranks(2, hang_on_rank_one, timeout=2.0)
    assert ranks(1, place)[0][0] == "0"  # and the next request is served


def test_nothing_is_left_when_the_tests_are_killed() -> None:
    script = "from tests import distributed, test_distributed as t; print('up', flush=True); "
    script += "distributed.run_ranks(2, t.hang_on_rank_one)"
    # The mark is in the environment of all that the script starts, and in nobody else's.
    environment = {**os.environ, "RANKS_OF": f"test-{os.getpid()}"}
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE
    ) as tests:
        assert tests.stdout is not None and tests.stdout.readline() == b"up\n"
        _wait_for(lambda: len(_marked(environment["RANKS_OF"])) >= 4)  # the script, the zygote, two ranks
        tests.kill()
    _wait_for(lambda: not _marked(environment["RANKS_OF"]))


def _marked(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"RANKS_OF={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # another's, or gone meanwhile
            continue
    return found


def _wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_run_python_gives_exit_code_and_both_outputs(tmp_path: Path) -> None:
    (tmp_path / "speak.py").write_text("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    result = run_python(["speak"], cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_run_python_kills_what_takes_too_long(tmp_path: Path) -> None:
    (tmp_path / "sleep.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_python(["sleep"], cwd=tmp_path, timeout=1)
    assert "begun" in "".join(caught.value.__notes__)
