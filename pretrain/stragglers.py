"""Which rank is slow: each rank's own seconds in the steps that are logged, compared.

Ranks that wait for each other all take as long as the slowest, so a step's time says nothing. A rank's own seconds are those that
it waited for its data, and those of its forward and backward passes without what it spent in exchanges with others. They are
measured in steps that are logged, and exchanged there in one all-reduce. Compared are the ranks of one pipeline stage,
for stages differ by themselves. On a GPU the passes are timed by events on its stream, the exchanges as what its stream waits.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from parallel.collectives import Watch
from parallel.grid import Grid

LEAST = 0.02  # seconds that a rank must be behind to be told of: less is the machine's noise
TWICE = 2  # logged steps in a row that it must be so


class Slowest(NamedTuple):
    """Of the ranks of one stage the one that is farthest from its middle; `median` is that of its stage."""

    rank: int
    host: str
    seconds: float
    median: float


class Clock(Protocol):
    def around(self, group: str) -> AbstractContextManager[Any]:
        """An exchange, which is not counted."""

    def seconds(self) -> float:
        """From the making to now."""


class HostClock:
    """Where the host waits for each exchange."""

    def __init__(self) -> None:
        self.elsewhere, self.thread, self.started = 0.0, threading.current_thread(), time.perf_counter()

    @contextlib.contextmanager
    def around(self, group: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        if threading.current_thread() is self.thread:  # not that which saves
            self.elsewhere += time.perf_counter() - before

    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.elsewhere


class DeviceClock:
    """Where a GPU's stream does."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.waits: list[tuple[Any, Any]] = []
        self.started = self._event()

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def around(self, group: str) -> Iterator[None]:
        if threading.current_thread() is not self.thread:
            yield
            return
        before = self._event()
        yield
        self.waits.append((before, self._event()))

    def seconds(self) -> float:
        ended = self._event()
        ended.synchronize()
        return (self.started.elapsed_time(ended) - sum(one.elapsed_time(other) for one, other in self.waits)) / 1000


class Stragglers:
    """factor: how many times the median of its stage a rank must take to be told of."""

    def __init__(self, grid: Grid, factor: float) -> None:
        self.grid, self.factor = grid, factor
        self.own = 0.0
        self.hosts: list[str] = []
        self.behind: tuple[int, int] = (-1, 0)  # the rank, and for how many logged steps

    @contextlib.contextmanager
    def measuring(self, wanted: bool) -> Iterator[None]:
        """Around the forward and backward passes."""
        if not wanted or self.grid.world == 1:
            yield
            return
        clock: Clock = DeviceClock() if self.grid.device.type == "cuda" else HostClock()
        with Watch(clock.around):
            yield
        self.own = clock.seconds()

    def compare(self, waited: float) -> tuple[dict[str, Any], str]:
        """Of the step that was measured, of which this rank waited so long for its data: fields for metrics, and a warning
        where a rank begins to straggle. Collective."""
        world = self.grid.world
        if world == 1:
            return {}, ""
        self.hosts = self.hosts or self.grid.from_all(platform.node())
        ours = [0.0] * world
        ours[self.grid.rank] = self.own + waited
        found = slowest(self.grid.total_on_host(*ours), self.hosts, self.grid.layout.pipeline)
        fields = {
            "slowest_rank": found.rank,
            "slowest_rank_seconds": found.seconds,
            "median_rank_seconds": found.median,
        }
        return fields, self._warning(found)

    def _warning(self, found: Slowest) -> str:
        is_slow = found.seconds > max(self.factor * found.median, found.median + LEAST)
        rank, times = self.behind
        self.behind = (found.rank, times + 1 if rank == found.rank else 1) if is_slow else (-1, 0)
        if self.behind[1] != TWICE:
            return ""
        return (
            f"rank {found.rank} ({found.host}) is slow: {found.seconds:.3f} s of its own a step, where ranks of its kind take "
            f"{found.median:.3f}; all wait for it"
        )


def slowest(seconds: list[float], hosts: list[str], stages: int) -> Slowest:
    """seconds, hosts: of each rank; those of a pipeline stage are neighbours."""
    size = len(seconds) // stages
    found = []
    for first in range(0, len(seconds), size):
        median = statistics.median_low(seconds[first : first + size])
        rank = max(range(first, first + size), key=seconds.__getitem__)
        found.append(Slowest(rank, hosts[rank], seconds[rank], median))
    return max(found, key=lambda one: one.seconds / max(one.median, 1e-9))
