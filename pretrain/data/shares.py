"""Whose turn it is in a mixture: shares of slots, the round robin over them, and how often each source was taken, in closed form.

Legend: L lanes, K sources, P stretches (parts of a run in which the shares are the same).

A period of 4096 slots gives each source its share of them, spread by a smooth weighted round robin. Each lane walks the period
from a place of its own. Where the shares change, at any sample number, a new stretch begins: each lane walks the new period
from another place of its own, and each source goes on behind the visits that the lane had made to it (`base`). So what a lane
has taken of a source up to any sample number is arithmetic: a base, whole periods, and a look into a table of 4096.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

PERIOD = 4096

Integers = np.ndarray[Any, np.dtype[np.int64]]


class Stretch(NamedTuple):
    """From sample number `first` on each source has so many slots of a period; base: (L, K), each lane's visits before."""

    first: int
    slots: tuple[int, ...]
    base: Integers


def slots_of(weights: Sequence[float], slots: int = PERIOD) -> tuple[int, ...]:
    """So many slots shared by weight, each source's whole part first, then one more to the largest remainders."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    found = np.floor(shares * slots).astype(np.int64)
    largest_remainder = np.argsort(found - shares * slots, kind="stable")
    found[largest_remainder[: slots - int(found.sum())]] += 1
    return tuple(found.tolist())


@functools.lru_cache(maxsize=256)
def round_robin(slots: tuple[int, ...]) -> tuple[Integers, Integers]:
    """Which source each slot of a period takes, (PERIOD,); and how often each had been taken before, (K, PERIOD + 1)
    in 16 bits.

    Smooth: in each slot all gain their share, the richest is taken and pays the period."""
    gains, credit = np.array(slots, np.int64), np.zeros(len(slots), np.int64)
    taken = np.zeros(PERIOD, np.int64)
    for slot in range(PERIOD if len(slots) > 1 else 0):
        credit += gains
        taken[slot] = np.argmax(credit)
        credit[taken[slot]] -= PERIOD
    ones = taken[None, :] == np.arange(len(slots))[:, None]
    before = np.concatenate([np.zeros((len(slots), 1), np.int64), np.cumsum(ones, axis=1)], axis=1)
    return taken, before.astype(np.int16)


class Turns:
    """The walk of all lanes through all stretches. starts: (P, L), the slot at which a lane begins in each."""

    def __init__(self, stretches: Sequence[Stretch], starts: Integers) -> None:
        tables = [round_robin(stretch.slots) for stretch in stretches]
        self.firsts = np.array([stretch.first for stretch in stretches], np.int64)
        self._lanes, self._starts = starts.shape[1], starts
        self._taken = np.stack([taken for taken, _ in tables])  # (P, PERIOD)
        self._before = np.stack([before for _, before in tables])  # (P, K, PERIOD + 1)
        self._slots = np.array([stretch.slots for stretch in stretches], np.int64)  # (P, K)
        lanes = np.arange(self._lanes)
        self._begins = -((lanes - self.firsts[:, None]) // self._lanes)  # (P, L): turns of a lane before the stretch
        # A source's visits up to slot s of the walk's q-th period are base + q slots + before[s], once this is taken off.
        base = np.stack([stretch.base for stretch in stretches])  # (P, L, K)
        self._base = base - np.stack([table[1][:, start].T for table, start in zip(tables, starts, strict=True)])

    def visit(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Source of each sample number (B,), and which visit of its lane to that source it is."""
        turn, lane = np.divmod(numbers, self._lanes)
        stretch = np.maximum(np.searchsorted(self.firsts, numbers, side="right") - 1, 0)
        period, slot = np.divmod(turn - self._begins[stretch, lane] + self._starts[stretch, lane], PERIOD)
        source = self._taken[stretch, slot]
        before = self._base[stretch, lane, source] + self._before[stretch, source, slot]
        return source, before + period * self._slots[stretch, source]

    def visits(self, number: int) -> Integers:
        """(L, K): each lane's visits to each source before a sample number."""
        stretch = max(int(np.searchsorted(self.firsts, number, side="left")) - 1, 0)
        turn = -((np.arange(self._lanes) - max(number, int(self.firsts[0]))) // self._lanes) - self._begins[stretch]
        period, slot = np.divmod(turn + self._starts[stretch], PERIOD)
        before: Integers = self._base[stretch] + period[:, None] * self._slots[stretch]
        return before + self._before[stretch][:, slot].T
