"""RUN/heartbeat.json: where a run is and that it lives, for whoever looks from outside.

    {"step": 120, "phase": "forward-backward", "since": 1700000000.2, "time": 1700000003.2, "host": "node-a", "pid": 71}

Rank 0 writes it once a second, whole or not at all. `time` is when it did, `since` when it had come to that place (both in
seconds since 1970). A run that ended has the phase `done`, by an error of its own `failed: ` and the error; one whose `time`
stands still was killed, or its host was.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

NAME = "heartbeat.json"
PERIOD = 1.0  # seconds


class Pulse:
    """Writes the file from a thread of its own until `stop`. place: the step and phase that the run is in."""

    def __init__(self, folder: Path, place: Callable[[], tuple[int, str]]) -> None:
        self.path, self.place = folder / NAME, place
        self.last, self.since = (-1, ""), 0.0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Write the place once more, and no more."""
        self.over.set()
        self.thread.join()

    def _beat(self) -> None:
        while True:
            over = self.over.is_set()
            with contextlib.suppress(OSError):  # a full disk: who looks sees the time stand still
                self._write()
            if over:
                return
            self.over.wait(PERIOD)

    def _write(self) -> None:
        now, place = time.time(), self.place()
        if place != self.last:
            self.last, self.since = place, now
        step, phase = place
        fields = {"step": step, "phase": phase, "since": self.since, "time": now}
        partial = self.path.with_name(f".{NAME}.partial")
        partial.write_text(json.dumps({**fields, "host": platform.node(), "pid": os.getpid()}) + "\n")
        os.replace(partial, self.path)
