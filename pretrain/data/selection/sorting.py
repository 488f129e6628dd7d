"""Sorting more records than fit in memory: sorted runs in files, merged by blocks.

A record is a row of uint64 columns; order is by the first, then the next. Blocks come out in order, each of no more memory
than was given, whatever keys are equal.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Records = np.ndarray[Any, np.dtype[np.uint64]]
SHARE = 4  # sorting holds the records, their order, and a copy
LEAST_ROWS = 256  # of a run that are read at once


class Sorter:
    """Records (N, columns) added in any order, given back sorted. folder: of the files. memory: bytes, about."""

    def __init__(self, folder: Path, columns: int, memory: int) -> None:
        self.folder, self.columns = folder, columns
        self.rows = max(memory // (SHARE * 8 * columns), LEAST_ROWS)
        self._waiting: list[Records] = []
        self._count = 0
        self._runs: list[Path] = []

    def add(self, records: Records) -> None:
        """Take records (n, columns)."""
        for first in range(0, len(records), self.rows):
            part = records[first : first + self.rows]
            if self._count + len(part) > self.rows:
                self._spill()
            self._waiting.append(part)
            self._count += len(part)

    def blocks(self) -> Iterator[Records]:
        """All records in order. Removes the files behind itself."""
        if not self._runs:
            if self._count:
                yield self._sorted()
            return
        self._spill()
        try:
            yield from self._merged()
        finally:
            for run in self._runs:
                run.unlink(missing_ok=True)

    def _sorted(self) -> Records:
        found = in_order(np.concatenate(self._waiting))
        self._waiting, self._count = [], 0
        return found

    def _spill(self) -> None:
        if self._count:
            path = self.folder / f"run-{len(self._runs)}"
            self._sorted().tofile(path)
            self._runs.append(path)

    def _merged(self) -> Iterator[Records]:
        rows = max(self.rows // len(self._runs), LEAST_ROWS)
        runs = [_Run(path, self.columns, rows) for path in self._runs]
        while runs := [run for run in runs if run.fill()]:
            bounds = [run.buffer[-1] for run in runs if run.has_more]
            bound = min(bounds, key=lambda row: tuple(row.tolist())) if bounds else None
            yield in_order(np.concatenate([run.take(bound) for run in runs]))


class _Run:
    """A sorted file, read by pieces."""

    def __init__(self, path: Path, columns: int, rows: int) -> None:
        self.path, self.columns, self.rows = path, columns, rows
        self.left = path.stat().st_size // (8 * columns)
        self.done = 0
        self.buffer: Records = np.empty((0, columns), np.uint64)

    @property
    def has_more(self) -> bool:
        return self.left > 0

    def fill(self) -> bool:
        """Read on if nothing waits; whether there is anything."""
        if not len(self.buffer) and self.left:
            count = min(self.rows, self.left)
            offset = self.done * 8 * self.columns
            found = np.fromfile(self.path, np.uint64, count * self.columns, offset=offset)
            self.buffer = found.reshape(count, self.columns)
            self.done, self.left = self.done + count, self.left - count
        return len(self.buffer) > 0

    def take(self, bound: Records | None) -> Records:
        """What is not behind the bound."""
        end = len(self.buffer) if bound is None else rows_up_to(self.buffer, bound)
        found, self.buffer = self.buffer[:end], self.buffer[end:]
        return found


def in_order(records: Records) -> Records:
    """Sorted by the first column, then the next."""
    found: Records = records[np.lexsort(records.T[::-1])]
    return found


def rows_up_to(records: Records, bound: Records) -> int:
    """How many of the sorted records are at most the bound."""
    low, high = 0, len(records)
    for column, value in enumerate(bound):
        part = records[low:high, column]
        low, high = low + int(np.searchsorted(part, value, "left")), low + int(np.searchsorted(part, value, "right"))
    return high


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name, then rename it: it is there whole or not at all."""
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with open(draft, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
