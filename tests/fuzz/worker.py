"""Reads changed files in a process of its own, so that a crash, a hang and memory without end are findings like any other."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from tests.fuzz.subjects import Files, Subject

SECONDS = 5  # of CPU
WALL_SECONDS = 120  # a machine may be busy
BYTES = 500 << 20  # beyond what the process has at its start
ADDRESSES = 8 << 30


class Worker:
    """Forked from this process, and anew after each that died."""

    def __init__(self, subjects: dict[str, Subject]) -> None:
        self._subjects = subjects
        self._process: Any = None
        self._pipe: Connection | None = None

    def run(self, name: str, files: Files) -> str:
        """ "right", "refused", or what is wrong."""
        if self._process is None:
            self._start()
        assert self._pipe is not None
        self._pipe.send_bytes(json.dumps([name, {file: data.hex() for file, data in files.items()}]).encode())
        try:
            if self._pipe.poll(WALL_SECONDS):
                return self._pipe.recv_bytes().decode()
            outcome = f"no answer in {WALL_SECONDS} seconds"
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            hung = code == -signal.SIGPROF
            outcome = f"more than {SECONDS} seconds" if hung else f"the process died with {code}"
        self.close()
        return outcome

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None

    def _start(self) -> None:
        self._pipe, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(self._subjects, there, self._pipe), daemon=True)
        self._process.start()
        there.close()


def _serve(subjects: dict[str, Subject], pipe: Connection, other: Connection) -> None:
    other.close()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    while True:
        try:
            name, files = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        outcome = outcome_of(subjects[name], {file: bytes.fromhex(data) for file, data in files.items()})
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(outcome.encode("utf-8", "backslashreplace"))


def outcome_of(subject: Subject, files: Files) -> str:
    """What comes of reading the files, in this process."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        before = _peak()
        try:
            found = subject.read(Path(folder))
            subject.judge(files, found)
            outcome = "right" if not found.skipped else "refused"
        except UserError as error:
            readable = str(error) and len(str(error)) < 2000
            outcome = "refused" if readable else f"an unreadable message: {error!r:.300}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:500]
        if (more := _peak() - before) > BYTES:
            outcome = f"{more >> 20} MiB more"
    return outcome


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
