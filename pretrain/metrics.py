"""metrics.jsonl: one JSON object a line, appended as the run goes, cut back when the run is set back."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pretrain.config.folder import METRICS


class Metrics:
    """Appends to RUN/metrics.jsonl. `step`: the run stands after so many steps and was sent back `rewinds` times; lines
    beyond either, and a line that a killed process left unfinished, are removed first. Lines for which the disk has no room
    wait in memory, some hundred bytes each, which `warn` is told once; `flush` raises OSError where some still wait."""

    def __init__(self, run: Path, step: int, warn: Callable[[str], None] = lambda _: None, rewinds: int = 0) -> None:
        path = run / METRICS
        if path.exists():
            _cut_back(path, step, rewinds)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._waiting, self._warn, self._full = b"", warn, False
        self._lock = threading.Lock()  # the thread that saves flushes

    def write(self, fields: dict[str, Any]) -> None:
        line = (json.dumps(finite(fields), allow_nan=False) + "\n").encode()
        try:
            self._put(line)
        except OSError as error:
            if not self._full:
                self._warn(f"{METRICS} cannot be written: {error}; its lines wait in memory until there is room")
            self._full = True

    def flush(self) -> None:
        """Bring the lines to the disk."""
        self._put()
        os.fsync(self._file.fileno())

    def _put(self, line: bytes = b"") -> None:
        with self._lock:
            self._waiting += line
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._full = False

    def close(self) -> None:
        self._file.close()


def finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no word for a number that is not finite: null stands for it."""
    return {name: _finite(value) for name, value in fields.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return finite(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a run's metrics, oldest first."""
    try:
        with open(run / METRICS, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    fields = json.loads(line)
                except ValueError:
                    continue  # unfinished: the process was killed while it wrote
                if isinstance(fields, dict) and isinstance(fields.get("step"), int):
                    yield fields
    except FileNotFoundError:
        return


def _cut_back(path: Path, step: int, rewinds: int) -> None:
    partial = path.with_name(f".{METRICS}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for fields in read_metrics(path.parent):
            # A run at step 0 says again what it is.
            if step and fields["step"] <= step and fields.get("rewinds", 0) <= rewinds:
                file.write(json.dumps(fields) + "\n")
    os.replace(partial, path)
