"""Losses that jump far above the recent ones, and what the run does about them (`run.on_spike`).

A level follows the loss: the mean of the recent losses and their mean distance from it, over about MEMORY steps. A loss that
lies more than `run.spike_factor` such distances above is a spike. To the level it counts as one that is only high, so neither one
spike nor several in a row hide the next. Two numbers and a count are all of it; they are in the run's state, so a resumed run
judges as the uninterrupted one. All ranks go by rank 0's number.

`skip` leaves the step out, as one without a finite gradient is. `rewind` goes back to the newest good checkpoint and passes
over the samples that were taken since (Chowdhery et al. 2022, section 5.1): which sample numbers a step takes stays a pure
function, of the step and the list of ranges passed over (`past`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

MEMORY = 30  # steps that the level remembers
HIGH = 1  # distances above the mean that a spike counts as: the distance itself stays as it was
WARM_UP = 20  # losses before which nothing is a spike

Ranges = tuple[tuple[int, int], ...]  # of sample numbers, [first, end), ascending and apart


class Level(NamedTuple):
    """Of the losses so far."""

    losses: int = 0
    mean: float = 0.0
    distance: float = 0.0

    def is_spike(self, loss: float, factor: float) -> bool:
        """Whether a loss is one. What is not finite is none: its gradient is not either, and the step is left out."""
        return self.losses >= WARM_UP and math.isfinite(loss) and loss > self.mean + factor * self.distance

    def after(self, loss: float, factor: float) -> Level:
        """The level with this loss."""
        if not math.isfinite(loss):
            return self
        if self.is_spike(loss, factor):
            loss = self.mean + HIGH * self.distance
        share = 1 / min(self.losses + 1, MEMORY)
        mean = self.mean + share * (loss - self.mean)
        return Level(self.losses + 1, mean, self.distance + share * (abs(loss - mean) - self.distance))

    def __str__(self) -> str:
        return f"{self.mean:.4f}, give or take {self.distance:.4f}"


def past(sample: int, skipped: Iterable[tuple[int, int]]) -> int:
    """The sample number that stands where `sample` would without ranges that are passed over."""
    for first, end in skipped:
        if sample >= first:
            sample += end - first
    return sample


def passing(skipped: Ranges, first: int, end: int) -> Ranges:
    """The ranges with one more behind them, joined to the last where it follows that."""
    if skipped and skipped[-1][1] == first:
        return (*skipped[:-1], (skipped[-1][0], end))
    return (*skipped, (first, end))
