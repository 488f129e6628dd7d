"""The processes of a run on this machine, watched until all have ended.

Rank 0 writes to this terminal, the others to logs/rank-N.log. Ctrl-C, SIGTERM and a closed terminal are passed on
once, so that the ranks save and end together; a Ctrl-C after that kills (another SIGTERM does not: Slurm sends two). When
a rank fails the others can only wait for it: they get a few seconds to say what they saw, then they are killed, as is at
once a rank that was stopped (SIGSTOP) and that the others gave up. No rank outlives this process, however it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pretrain.errors import Exit, UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0  # from a rank's failure to the end of the others
SAVED_GRACE_SECONDS = 30.0  # after a wish to stop: rank 0 still closes its files when others have gone
LOG_LINES = 15
PR_SET_PDEATHSIG = 1


def say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)


@dataclass
class Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path | None  # None: this terminal
    begun: int = 0  # where in the log this session's words begin

    def kill(self) -> None:
        """With what it started: it leads a group of its own."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def stopped(self) -> bool:
        """By SIGSTOP or a debugger: it can do nothing. Only Linux tells."""
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        except OSError:
            return False

    def last_words(self, count: int) -> list[str]:
        if self.log is None:
            return []
        return self.log.read_bytes()[self.begun :].decode(errors="replace").splitlines()[-count:]


@dataclass
class Ranks:
    """The processes of a run."""

    command: list[str]
    environments: list[dict[str, str]]
    logs: Path
    ranks: list[Rank] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)  # signals that asked to stop
    passed_on: bool = False

    def wait(self) -> int:
        """Start all; wait until all have ended; the exit code."""
        with self._passing_signals():
            try:
                self._start()
                return self._watch()
            finally:
                for rank in self.ranks:
                    rank.kill()  # also what a rank that has ended left behind
                    rank.process.wait()

    def _start(self) -> None:
        for environment in self.environments:
            number = int(environment["RANK"])
            log = self._log(number) if number else None
            with open(log or os.devnull, "ab") as file:  # behind what an earlier session told
                begun = file.tell()
                process = subprocess.Popen(
                    self.command,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file if log else None,
                    stderr=subprocess.STDOUT if log else None,
                    start_new_session=True,  # a Ctrl-C reaches the ranks through us alone, once
                    preexec_fn=_DieWithParent(os.getpid()),
                )
            self.ranks.append(Rank(number, process, log, begun))

    def _log(self, number: int) -> Path:
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: {self.logs} cannot be made: {error.strerror}") from error
        return self.logs / f"rank-{number}.log"

    def _watch(self) -> int:
        """Until all have ended, or some time after the first has failed."""
        first: Rank | None = None
        deadline = float("inf")
        while any(rank.process.poll() is None for rank in self.ranks) and time.monotonic() < deadline:
            if signal.SIGINT in self.asked[1:]:
                say("killed")
                return 128 + self.asked[-1]
            self._pass_on()
            first = first or self._failed()
            if first is not None and deadline == float("inf"):
                deadline = time.monotonic() + self._grace(first)
            if first is not None and all(rank.stopped for rank in self._running()):
                break
            time.sleep(POLL_SECONDS)
        if first is None or first.process.returncode == Exit.PARTED:  # which says that another was first
            first = self._failed()
        if first is None:
            return 0
        self._tell(first)
        return _exit_code(first)

    def _grace(self, first: Rank) -> float:
        saved = self.asked or first.process.returncode == Exit.STOPPED
        return SAVED_GRACE_SECONDS if saved else GRACE_SECONDS

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.process.poll() is None]

    def _failed(self) -> Rank | None:
        """A rank that ended with an error: one that was killed before one that only lost its peer."""
        failed = [rank for rank in self.ranks if rank.process.poll() not in (None, 0)]
        return min(failed, key=lambda rank: rank.process.returncode, default=None)

    def _tell(self, first: Rank) -> None:
        """Which rank failed, how, and its last words; nothing where all ended alike and rank 0, which told it, is ours, or
        where all saved as they were asked to."""
        code = first.process.returncode
        alike = all(rank.process.returncode == code for rank in self.ranks)
        if alike and (code == Exit.STOPPED or (code > 0 and self.ranks[0].number == 0)):
            return
        if code == Exit.PARTED:
            how = "gave up waiting for another"
        else:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._quote(first, LOG_LINES)
        left = [rank for rank in self.ranks if rank.process.returncode is None]
        say(
            f"rank {first.number} {how}"
            + _named("; ended, since stopped (by SIGSTOP or a debugger)", [rank for rank in left if rank.stopped])
            + _named("; the ranks that waited for it are ended", [rank for rank in left if not rank.stopped])
        )
        gave_up = [rank for rank in self.ranks if rank.process.returncode == Exit.PARTED and rank.log is not None]
        if code < 0 and gave_up:  # the others know what it was doing
            self._quote(gave_up[0], 1)
        if not self.asked and code != Exit.MISTAKE:
            say("the same command goes on from the last checkpoint, if there is one")

    def _quote(self, rank: Rank, count: int) -> None:
        if lines := rank.last_words(count):
            say("\n".join([f"the end of {rank.log}:", *(f"  {line}" for line in lines)]))

    @contextmanager
    def _passing_signals(self) -> Iterator[None]:
        for number in SIGNALS:
            signal.signal(number, self._receive)
        try:
            yield
        finally:  # nothing is left to stop: who ends the other nodes of a run must not spoil this one's exit code
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(number)

    def _pass_on(self) -> None:
        """The user's first wish to stop, to all ranks."""
        if not self.asked or self.passed_on:
            return
        self.passed_on = True
        say("asked all ranks to save and end (Ctrl-C once more kills them)")
        wish = signal.SIGINT if self.asked[0] == signal.SIGINT else signal.SIGTERM
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(wish)


class _DieWithParent:
    """Has the kernel kill a new process when this one ends, SIGKILL included. The library is loaded before the fork."""

    def __init__(self, parent: int) -> None:
        self.parent, self.libc = parent, ctypes.CDLL(None)

    def __call__(self) -> None:
        self.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:  # it ended just before
            os._exit(1)


def _named(words: str, ranks: list[Rank]) -> str:
    return f"{words}: {', '.join(str(rank.number) for rank in ranks)}" if ranks else ""


def _exit_code(rank: Rank) -> int:
    code = rank.process.returncode
    return 128 - code if code < 0 else code
