"""Several runs of one setting: mean, standard deviation, expected best of n, share of failed runs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """The mean of at least one finite value."""
    return math.fsum(_checked(values)) / len(values)


def standard_deviation(values: Sequence[float]) -> float | None:
    """The sample's (divided by n - 1); None for a single value, of which there is none."""
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None


def expected_best(values: Sequence[float], n: int) -> float:
    """E[max] of n runs drawn from the values with replacement: sum of v_i (F(v_i)^n - F(v_(i-1))^n) (2002.06305, 1909.03004)."""
    if n < 1:
        raise ValueError(f"a budget of {n} runs")
    ordered = sorted(_checked(values))
    total = len(ordered)
    return math.fsum(v * ((i / total) ** n - ((i - 1) / total) ** n) for i, v in enumerate(ordered, 1))


def share_failed(values: Sequence[float], floor: float, margin: float = 0.01) -> float:
    """Share of runs at or below the floor (the commonest class) and the margin, or NaN: runs that learned nothing."""
    if not values:
        raise ValueError("no runs")
    return sum(not value > floor + margin for value in values) / len(values)


def _checked(values: Sequence[float]) -> Sequence[float]:
    if not values or not all(map(math.isfinite, values)):
        raise ValueError("at least one value, and finite ones, are needed")
    return values
