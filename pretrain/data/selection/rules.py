"""What a rule is: a number that is measured of a text, the bounds that it must keep within, and how a report draws it.

A group of rules measures many texts at once; the rules of a group stand in an order, and the first that a text breaks is why
it is dropped. Whatever is measured is a pure function of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.selection.words import Texts

Array = np.ndarray[Any, Any]
BINS = 48


class Scale(NamedTuple):
    """How a measure's histogram is cut: BINS equal ones between two numbers, of the number or of its logarithm."""

    low: float
    high: float
    log: bool = False

    def bins(self, values: Array) -> Array:
        """(D,) int: the bin of each value; what lies outside falls into the first or the last."""
        return np.minimum((self.places(values) * BINS).astype(np.int64), BINS - 1)

    def places(self, values: Any) -> Any:
        """Where values lie, from 0 (the scale's low end or below) to 1."""
        low, high = self.low, self.high
        if self.log:
            low, high, values = np.log(low), np.log(high), np.log(np.maximum(values, low))
        return np.clip((values - low) / (high - low), 0.0, 1.0)

    def value(self, place: float) -> float:
        """The value at a place from 0 to 1."""
        if self.log:
            return float(self.low * (self.high / self.low) ** place)
        return self.low + place * (self.high - self.low)


SHARES = Scale(0.0, 1.0)
COUNTS = Scale(1.0, 1e6, log=True)


class Rule(NamedTuple):
    """A measure by its name, as reports give it, and what it may be: at least `least`, at most `most`."""

    name: str
    least: float | None = None
    most: float | None = None
    scale: Scale | None = SHARES  # None: counted, and not drawn

    def broken(self, values: Array) -> Array:
        """(D,) bool. What was not measured (NaN) breaks nothing."""
        low = values < self.least if self.least is not None else np.zeros(len(values), bool)
        return low | (values > self.most) if self.most is not None else low

    def sentence(self, value: float) -> str:
        """Why a text with this value is dropped."""
        if self.least is not None and value < self.least:
            return f"{self.name} {number(value)}, at least {number(self.least)} wanted"
        return f"{self.name} {number(value)}, at most {number(self.most or 0)} allowed"


Measure = Callable[[Sequence[str], Texts], Array]


class Group(NamedTuple):
    """Rules that are measured together, (D, rules) of D texts; change: what is made of a text before, and goes on."""

    rules: tuple[Rule, ...]
    measure: Measure
    change: Callable[[str], str] | None = None


def group_of(
    rules: Sequence[tuple[Rule, Measure]], source: str = "", change: Callable[[str], str] | None = None
) -> Group:
    """The group of those rules that have a bound, each with its measure (D,); the others are off. source: whose they are."""
    named = [(rule._replace(name=f"{source}: {rule.name}" if source else rule.name), one) for rule, one in rules]
    on = [(rule, measure) for rule, measure in named if rule.least is not None or rule.most is not None]

    def measure(strings: Sequence[str], texts: Texts) -> Array:
        values = [one(strings, texts) for _, one in on]
        return np.stack(values, axis=1).astype(np.float64) if values else np.zeros((len(texts), 0))

    return Group(tuple(rule for rule, _ in on), measure, change)


def number(value: float) -> str:
    """A number as people read it."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def over(parts: Array, whole: Array) -> Array:
    """parts / whole, elementwise; 0 where there is nothing."""
    return np.divide(parts, whole, out=np.zeros(len(whole)), where=whole > 0)
