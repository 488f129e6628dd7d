"""Pearson's and Spearman's correlation of predicted with gold numbers; the state keeps the pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class NumberPairs:
    """(N,) float64 gold and predicted numbers. Sum states with +: the figures do not depend on the order of pairs."""

    gold: Array
    predicted: Array

    @classmethod
    def of(cls, gold: Sequence[float] | Array = (), predicted: Sequence[float] | Array = ()) -> NumberPairs:
        """Pairs of two equally long sequences; none: the state before any example."""
        left, right = np.asarray(gold, np.float64), np.asarray(predicted, np.float64)
        if left.shape != right.shape or left.ndim != 1:
            raise ValueError(f"{left.shape} gold numbers and {right.shape} predictions")
        order = np.lexsort((right, left))  # sums round alike whatever rank a pair came from
        return cls(left[order], right[order])

    def __add__(self, other: NumberPairs) -> NumberPairs:
        return self.of(np.concatenate([self.gold, other.gold]), np.concatenate([self.predicted, other.predicted]))

    @property
    def pearson(self) -> float:
        """Pearson's r; NaN for fewer than two pairs, a constant side or a prediction that is not finite."""
        return _pearson(self.gold, self.predicted)

    @property
    def spearman(self) -> float:
        """Spearman's rho: Pearson's r of the ranks, equal numbers sharing the mean of theirs."""
        if not (np.isfinite(self.gold).all() and np.isfinite(self.predicted).all()):
            return math.nan
        return _pearson(average_ranks(self.gold), average_ranks(self.predicted))


def average_ranks(values: Array) -> Array:
    """(N,) ranks from 1; equal values get the mean of the ranks they cover."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)


def _pearson(left: Array, right: Array) -> float:
    if len(left) < 2 or not (np.isfinite(left).all() and np.isfinite(right).all()):
        return math.nan
    if (left == left[0]).all() or (right == right[0]).all():
        return math.nan
    left, right = _scaled(left), _scaled(right)
    spread = math.sqrt(float(left @ left)) * math.sqrt(float(right @ right))
    return max(-1.0, min(1.0, float(left @ right) / spread)) if spread else math.nan


def _scaled(values: Array) -> Array:
    """Deviations from the mean, at most about 1, so that no square overflows or vanishes."""
    values = values / max(np.abs(values).max(), np.finfo(np.float64).tiny)
    centred = values - values.mean()
    return np.asarray(centred / (np.abs(centred).max() or 1.0))
