"""RUN/logs/rank-N.log: what each rank tells, a line at a time with its moment; and all of them as one.

A rank's log has what it reports (rank 0) and all that its Python writes to standard error: warnings, tracebacks, the message of a
run that hangs. It is appended to, whoever starts the rank. Where the launcher has made the same file the rank's output, what
libraries write from below Python is there too, without moments.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import io
import os
import platform
import re
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.config.folder import LOGS
from pretrain.errors import UserError

POLL = 0.5  # seconds between looks for new lines
NAME = re.compile(r"rank-(\d+)\.log")
STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ")


class RankLog:
    """The log of this rank, as a context; from `start` on standard error goes there too."""

    def __init__(self, run: Path, rank: int, world: int) -> None:
        self.path, self.rank, self.world = run / LOGS / f"rank-{rank}.log", rank, world
        self.file: int | None = None
        self.errors: Any = None

    def __enter__(self) -> RankLog:
        return self

    def start(self) -> None:
        """Begin to write: what could be known before has been checked."""
        with contextlib.suppress(OSError):  # a folder that cannot be written is told by who claims it
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self.errors, sys.stderr = sys.stderr, Twice(self, None if self._is_output() else sys.stderr)
        self.line(f"rank {self.rank} of {self.world} on {platform.node()}, process {os.getpid()}")

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        if self.file is None:
            return
        if error is not None:
            self.line("".join(traceback.format_exception(error)))  # which Python writes only after this
        sys.stderr, file, self.file = self.errors, self.file, None
        os.close(file)

    def _is_output(self) -> bool:
        """Whether this process writes there anyway; then to its end, wherever it had opened it."""
        assert self.file is not None
        same = [number for number in (1, 2) if os.path.samestat(os.fstat(number), os.fstat(self.file))]
        for number in same:
            fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_APPEND)
        return 2 in same

    def line(self, text: str) -> None:
        """Whole lines, each with this moment, as one write. No room for them ends nothing."""
        if self.file is None:
            return
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with contextlib.suppress(OSError):
            os.write(self.file, "".join(f"{moment} {one}\n" for one in text.splitlines() or [""]).encode())


class Twice(io.TextIOBase):
    """Standard error that goes on to where it went before, and line by line to the log."""

    def __init__(self, log: RankLog, before: Any) -> None:
        self.log, self.before, self.begun = log, before, ""

    def write(self, text: str) -> int:
        if self.before is not None:
            self.before.write(text)
        *whole, self.begun = (self.begun + text).split("\n")
        if whole:
            self.log.line("\n".join(whole))
        return len(text)

    def flush(self) -> None:
        if self.before is not None:
            self.before.flush()

    def isatty(self) -> bool:
        return self.before is not None and self.before.isatty()

    def fileno(self) -> int:
        return 2


# -- all as one ------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    moment: str  # of the line, or of the one before it that has one
    rank: int
    text: str


class Reader:
    """A rank's log, read on from where it was left."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank, self.place, self.moment = path, rank, 0, ""

    def lines(self) -> Iterator[Line]:
        """Whole lines that have come since."""
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self.place:  # was begun anew
                self.place = 0
            file.seek(self.place)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.place += len(whole)
        for text in whole.decode(errors="replace").splitlines():
            if found := STAMP.match(text):
                self.moment, text = found[1], text[found.end() :]
            yield Line(self.moment, self.rank, text)


def readers(run: Path, ranks: Sequence[int]) -> list[Reader]:
    """Of all ranks, or of these."""
    names = ((path, NAME.fullmatch(path.name)) for path in (run / LOGS).glob("rank-*.log"))
    found = [Reader(path, int(match[1])) for path, match in names if match]
    return sorted((one for one in found if not ranks or one.rank in ranks), key=lambda one: one.rank)


def merged(logs: Sequence[Reader]) -> Iterator[Line]:
    """Lines of all, by their moment; of one rank in their order."""
    return heapq.merge(*(one.lines() for one in logs), key=lambda line: line.moment)


def main(args: argparse.Namespace) -> int:
    """`python -m pretrain logs`."""
    logs = readers(Path(args.folder), args.rank)
    if not logs:
        wanted = f" of rank {', '.join(map(str, args.rank))}" if args.rank else ""
        raise UserError(f"{args.folder}: no logs{wanted} in {LOGS}/ there; a run writes them from its start on")
    width = len(str(max(one.rank for one in logs)))
    lines: Any = merged(logs)
    for line in deque(lines, args.lines) if args.lines is not None else lines:
        _print(line, width)
    while args.follow:
        time.sleep(POLL)
        known = {one.rank for one in logs}
        logs += [one for one in readers(Path(args.folder), args.rank) if one.rank not in known]
        for line in merged(logs):
            _print(line, width)
    return 0


def _print(line: Line, width: int) -> None:
    print(f"{line.moment or '-':<24} rank {line.rank:>{width}} | {line.text}", flush=True)
