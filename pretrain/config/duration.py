"""Durations of training in steps, tokens or epochs: "200 steps", "10M tokens", "2.5 epochs"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FORM = re.compile(r"(\d{1,19}(?:\.\d{1,19})?(?:e\d{1,2})?)\s*([KMBT]?)\s+(steps?|tokens?|epochs?)", re.IGNORECASE)
LONGEST = 10**18  # beyond any run; keeps positions within 64 bits


@dataclass(frozen=True)
class Span:
    """`count` optimizer steps, training tokens (batch size x sequence length a step), or passes over the data."""

    count: int | Fraction  # whole but of epochs
    unit: Literal["steps", "tokens", "epochs"]

    def __str__(self) -> str:
        for suffix in ("T", "B", "M", "K"):
            if self.unit == "tokens" and self.count and self.count % UNITS[suffix] == 0:
                return f"{self.count // UNITS[suffix]}{suffix} tokens"
        return f"{float(self.count):.12g} epochs" if self.unit == "epochs" else f"{self.count} {self.unit}"


def parse_span(value: Any) -> Any:
    """A Span of text; ValueError says what is understood."""
    if isinstance(value, Span):
        return value
    match = FORM.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'expected a duration such as "200 steps" or "10M tokens", found {value!r:.60}')
    number, suffix, unit = match.groups()
    count = Fraction(number) * UNITS[suffix.upper()]  # exact: as floats, 4.1e6 is not 4.1 x 1e6
    if unit.lower().startswith("epoch"):
        return Span(count, "epochs")
    if count.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of {unit}")
    if count > LONGEST:
        raise ValueError(f"{value!r} is more than {LONGEST:.0e} {unit}, which no run is")
    return Span(int(count), "steps" if unit.lower().startswith("step") else "tokens")


Duration = Annotated[Span, BeforeValidator(parse_span), PlainSerializer(str, return_type=str)]


def _positive(span: Span) -> Span:
    if span.count < 1 and (span.unit != "epochs" or span.count == 0):
        raise ValueError(f"must be at least 1 step or token, found {span}")
    return span


Interval = Annotated[Duration, AfterValidator(_positive)]
