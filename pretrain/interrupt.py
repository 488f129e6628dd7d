"""Ctrl-C and SIGTERM as a wish: the loop saves after the step it is in and ends (several ranks, which must agree,
after the next one). A second Ctrl-C ends at once."""

from __future__ import annotations

import signal
import sys
from types import FrameType


class Interrupt:
    def __init__(self) -> None:
        self.asked = False
        self.exit_code = 0

    @classmethod
    def watch(cls) -> Interrupt:
        interrupt = cls()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt._receive)
        return interrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.exit_code = True, 128 + number
        if sys.stderr.isatty():
            print("\nsaving after this step (Ctrl-C again to leave at once)", file=sys.stderr)
