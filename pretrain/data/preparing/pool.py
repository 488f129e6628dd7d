"""Jobs done by several processes, none of which can hold up or lose the work.

A process that is killed is replaced and its job done again. So is one that gives no sign of life for a time, which is then
killed: a stopped process, a read that hangs. A job that ended or held up so many processes ends the work, with its name.
Jobs tell what they wrote in files; over the pipes go numbers alone.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.preparing.tools import Beat, Job
from pretrain.errors import UserError

ATTEMPTS = 3
TIMEOUT = 600.0  # seconds without a sign of life; a document of 256 MiB takes some minutes
ROOT = Path(__file__).resolve().parents[3]  # whose `pretrain` a worker imports, from whatever folder it was started


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    job: Job | None = None
    heard: float = 0.0
    unread: bytes = b""

    def give(self, job: Job) -> None:
        """Ask for a job. One that has died meanwhile is noticed by its end of the answers."""
        assert self.process.stdin is not None
        self.job, self.heard = job, time.monotonic()
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()

    def answers(self) -> Iterator[dict[str, Any]]:
        """What it has said since it was last asked; raises EOFError when it has ended."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            raise EOFError
        *lines, self.unread = (self.unread + data).split(b"\n")
        yield from map(json.loads, lines)

    def kill(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, and ends when that lets it go
            self.process.wait(5)


@dataclass
class Pool:
    """Up to `processes` processes on the work folder. timeout: seconds without a sign of life. say: takes lines for the user."""

    work: Path
    processes: int
    timeout: float
    say: Callable[[str], None]
    workers: list[_Worker] = field(default_factory=list)

    def run(self, jobs: Iterable[Job], name: Callable[[Job], str], beat: Beat, done: Callable[[Job], None]) -> None:
        """Do all jobs. name: of a job, for messages. beat, done: what is called while they are done.

        Raises UserError for a user's mistake, OSError as a process met it, and UserError with the name of a job that ended or
        held up its process ATTEMPTS times.
        """
        waiting, failures = deque[Job](), dict[Job, int]()
        source = iter(jobs)
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]

            def again(worker: _Worker, why: str) -> None:
                selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
                self.workers.remove(worker)
                worker.kill()
                if worker.job is not None:
                    self._count(worker.job, failures, name(worker.job), why)
                    waiting.append(worker.job)

            while True:
                self._hand_out(waiting, source, selector)
                if not any(worker.job for worker in self.workers):
                    return
                for key, _ in selector.select(timeout=self._patience()):
                    worker = key.data
                    try:
                        for answer in worker.answers():
                            self._take(worker, answer, beat, done)
                    except EOFError:
                        again(worker, _ending(worker.process))
                for worker in [one for one in self.workers if one.job and self._left(one) <= 0]:
                    again(worker, f"gave no sign of life for {self.timeout:g} s and was killed")

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.kill()
        self.workers.clear()

    def _hand_out(self, waiting: deque[Job], source: Iterator[Job], selector: selectors.DefaultSelector) -> None:
        while any(worker.job is None for worker in self.workers) or len(self.workers) < self.processes:
            job = waiting.popleft() if waiting else next(source, None)
            if job is None:
                return
            free = next((worker for worker in self.workers if worker.job is None), None)
            if free is None:
                free = _start(self.work)
                self.workers.append(free)
                selector.register(free.process.stdout, selectors.EVENT_READ, free)  # type: ignore[arg-type]
            free.give(job)

    def _take(self, worker: _Worker, answer: dict[str, Any], beat: Beat, done: Callable[[Job], None]) -> None:
        worker.heard = time.monotonic()
        if "beat" in answer:
            beat(*answer["beat"])
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "errno" in answer:
            raise OSError(answer["errno"], answer["text"], answer["file"])
        if "fault" in answer:
            raise RuntimeError(f"a process failed:\n{answer['fault']}")
        if "done" in answer:
            job, worker.job = worker.job, None
            assert job is not None
            done(job)

    def _count(self, job: Job, failures: dict[Job, int], name: str, why: str) -> None:
        failures[job] = failures.get(job, 0) + 1
        if failures[job] == ATTEMPTS:
            raise UserError(
                f"{name}: {ATTEMPTS} processes ended over it, of which the last {why}. What is done is kept: the same "
                "command goes on. For want of memory use fewer --processes; for a slow disk give a longer --timeout."
            )
        self.say(f"{name}: its process {why}; it is done again ({failures[job] + 1} of {ATTEMPTS})")

    def _left(self, worker: _Worker) -> float:
        return worker.heard + self.timeout - time.monotonic()

    def _patience(self) -> float:
        return max(0.0, min(self._left(worker) for worker in self.workers if worker.job))


def _start(work: Path) -> _Worker:
    """In a group of its own, since Ctrl-C is the main process's to answer; and what lies in the present folder, such as texts
    that are programs, is not imported (-P)."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pretrain.data.preparing.worker", str(work)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        process_group=0,
    )
    return _Worker(process)


def _ending(process: subprocess.Popen[bytes]) -> str:
    """How a process ended that should not have."""
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return "closed its answers"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
