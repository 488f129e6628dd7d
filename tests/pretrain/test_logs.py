"""Each rank has a log of its own, whoever started it; one command shows all of them as one, by time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pretrain import __main__ as program
from pretrain import logs
from pretrain.logs import RankLog
from tests.distributed import REPOSITORY, run_ranks
from tests.pretrain import running
from tests.training import write_config

MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def test_every_rank_of_a_run_writes_its_log_and_the_terminal_has_all_it_had(tmp_path: Path, tiny_data: Path) -> None:
    """Rank 1 warns on its standard error in the middle; a second session goes on in the same files."""
    config = write_config(tmp_path, tiny_data)
    arguments = ["train", str(config), *running.SHORT, "batch.micro_size=1", "schedule.total=3 steps"]
    first, second = run_ranks(2, running.run_main, arguments, warn_on_rank_1, timeout=60)
    assert first.code == 0 and second.err == "something is odd\n" and second.out == "", first.told + second.told
    told, other = ((tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert re.fullmatch(rf"{MOMENT} rank 0 of 2 on .*", told.splitlines()[0])
    plain = [re.sub(rf"^{MOMENT} ", "", line) for line in told.splitlines()]
    assert plain[1:] == first.out.splitlines() and "something is odd" in other
    again = running.command("train", tmp_path / "run")
    assert again.code == 0 and (tmp_path / "run" / "logs" / "rank-0.log").read_text().startswith(told)


def warn_on_rank_1() -> None:
    def warn(*_: object) -> None:
        print("something is odd", file=sys.stderr)

    if os.environ["RANK"] == "1":
        from parallel.replicated import PlainEngine

        running._on_call(PlainEngine, "step", 2, warn)


def test_where_the_log_is_the_output_nothing_is_there_twice_or_overwritten(tmp_path: Path) -> None:
    """As the launcher has it: opened at its beginning, by descriptors that would write over what was appended."""
    path = tmp_path / "logs" / "rank-1.log"
    path.parent.mkdir()
    script = f"""
import os, sys
from pathlib import Path
from pretrain.logs import RankLog
os.write(2, b"before\\n")
log = RankLog(Path({str(tmp_path)!r}), 1, 2)
with log:
    log.start()
    print("by Python", file=sys.stderr)
    os.write(2, b"from below\\n")
    print("half a ", file=sys.stderr, end="")
    print("line", file=sys.stderr)
os.write(2, b"after\\n")
"""
    with open(path, "wb") as file:
        ran = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, stdout=file, stderr=file, timeout=60)
    lines = [re.sub(rf"^{MOMENT}", "T", line) for line in path.read_text().splitlines()]
    assert ran.returncode == 0 and lines[0] == "before" and lines[1].startswith("T rank 1 of 2 on ")
    assert lines[2:] == ["T by Python", "from below", "T half a line", "after"]


def test_an_error_that_ends_a_rank_is_in_its_log(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 3, 4)
    with pytest.raises(ZeroDivisionError), log:
        log.start()
        raise ZeroDivisionError("no loss")
    text = (tmp_path / "logs" / "rank-3.log").read_text()
    assert "Traceback (most recent call last)" in text and text.endswith("ZeroDivisionError: no loss\n")


# -- all as one ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three logs; that of rank 10 begins without a moment."""
    (tmp_path / "logs").mkdir()
    write(tmp_path, 0, "00.000 a", "02.000 d", "02.500 e")
    write(tmp_path, 2, "01.000 b")
    (tmp_path / "logs" / "rank-10.log").write_text("raw\n2026-01-01T00:00:01.500Z c\n  more of c\nnot yet whole")
    return tmp_path


def write(run: Path, rank: int, *lines: str) -> None:
    with open(run / "logs" / f"rank-{rank}.log", "a") as file:
        file.writelines(f"2026-01-01T00:00:{line[:6]}Z{line[6:]}\n" for line in lines)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [
        f"{words[2]}:{text}"
        for line in capsys.readouterr().out.splitlines()
        for words, text in [(line.split(), line.split("| ")[1])]
    ]


def test_lines_come_by_time_with_their_rank(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has no moment stays behind the line before it; a line that is not whole yet is not shown."""
    assert program.main(["logs", str(run)]) == 0
    assert shown(capsys) == ["10:raw", "0:a", "2:b", "10:c", "10:  more of c", "0:d", "0:e"]
    assert program.main(["logs", str(run), "--lines", "2"]) == 0
    assert shown(capsys) == ["0:d", "0:e"]
    assert program.main(["logs", str(run), "--rank", "2", "10"]) == 0
    assert shown(capsys) == ["10:raw", "2:b", "10:c", "10:  more of c"]
    assert program.main(["logs", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "2026-01-01T00:00:00.000Z rank  0 | a"


def test_a_folder_without_logs_is_a_mistake(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["logs", str(tmp_path / "nothing")]) == 2
    assert program.main(["logs", str(run), "--rank", "7"]) == 2
    assert "no logs of rank 7" in capsys.readouterr().err


def test_it_goes_on_with_what_comes(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a rank that comes later, and of a log that is begun anew."""
    steps = iter([partial(write, run, 2, "03.000 f"), partial(write, run, 7, "04.000 g"), partial(begin_anew, run)])

    def sleep(_: float) -> None:
        step: Callable[[], None] | None = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(logs.time, "sleep", sleep)
    assert program.main(["logs", str(run), "--follow", "--lines", "1"]) == 130
    assert shown(capsys) == ["0:e", "2:f", "7:g", "2:h"]


def begin_anew(run: Path) -> None:
    (run / "logs" / "rank-2.log").write_text("2026-01-01T00:00:05.000Z h\n")


def test_a_disk_without_room_for_a_log_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").symlink_to("/dev/full")
    with RankLog(tmp_path, 0, 1) as log:
        log.start()
        log.line("lost")
        started = time.monotonic()
    assert time.monotonic() - started < 5
