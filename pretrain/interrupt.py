"""A wish to stop: Ctrl-C, SIGTERM, or the file RUN/stop. The loop saves after the step it is in and ends (several ranks,
which must agree, after the next one). A second Ctrl-C ends at once.

The file is for schedulers, whose signals may reach other processes than the ranks, and for people on another machine
(`touch RUN/stop`). Rank 0 looks for it, at most once a second, since it may lie on a disk that many nodes share.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType

LOOK = 1.0  # seconds


class Interrupt:
    """stop: the file that asks, on the rank that looks for it."""

    def __init__(self, stop: Path | None = None) -> None:
        self.stop, self.looked = stop, -LOOK
        self.received = False

    @classmethod
    def watch(cls, stop: Path | None = None) -> Interrupt:
        interrupt = cls(stop)
        interrupt.forget()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt._receive)
        return interrupt

    def forget(self) -> None:
        """A file that is there asked an earlier session."""
        if self.stop is not None:
            self.stop.unlink(missing_ok=True)

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        now = time.monotonic()
        if not self.received and self.stop is not None and now - self.looked >= LOOK:
            self.looked, self.received = now, self.stop.exists()
        return self.received

    def ignore(self) -> None:
        """From here on nothing is left to stop: who ends the others of a job must not spoil this one's exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if sys.stderr.isatty():
            print("\nsaving after this step (Ctrl-C again to leave at once)", file=sys.stderr)
