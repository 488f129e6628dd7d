"""Durations: exact, read back from what they print, and refused in words."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config.duration import Span, parse_span

FACTORS = {"": 1, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000, "T": 1_000_000_000_000}


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        ("200 steps", 200, "steps"),
        ("1 step", 1, "steps"),
        ("0 steps", 0, "steps"),
        ("10M tokens", 10_000_000, "tokens"),
        ("375m Tokens", 375_000_000, "tokens"),
        ("1.5e3 steps", 1500, "steps"),
        ("2e9 tokens", 2_000_000_000, "tokens"),
        ("  0.5 B  tokens ", 500_000_000, "tokens"),
        ("3.2T tokens", 3_200_000_000_000, "tokens"),
        ("10k steps", 10_000, "steps"),
        ("3 epochs", 3, "epochs"),
        ("0.25 epochs", Fraction(1, 4), "epochs"),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: str, count: int, unit: str) -> None:
    assert parse_span(text) == Span(count, unit)  # type: ignore[arg-type]


@given(st.decimals(0, 1000, places=3), st.sampled_from(["K", "M", "B", "T"]), st.sampled_from(["steps", "tokens"]))
def test_decimals_are_exact(number: Decimal, suffix: str, unit: str) -> None:
    assert parse_span(f"{number} {suffix} {unit}").count == number * FACTORS[suffix]


@given(st.decimals(0, 1000, places=3))
def test_epochs_may_be_parts_and_print_as_themselves(number: Decimal) -> None:
    span = parse_span(f"{number} epochs")
    assert span.count == Fraction(number) and parse_span(str(span)) == span


@pytest.mark.parametrize("text", ["4.1M tokens", "8.2B tokens", "1.001M tokens"])
def test_decimals_that_floats_round_are_exact_too(text: str) -> None:
    number, suffix = Decimal(text.split()[0][:-1]), text.split()[0][-1]
    assert float(number) * FACTORS[suffix] != number * FACTORS[suffix]
    assert parse_span(text).count == number * FACTORS[suffix]


@given(st.integers(0, 10**18), st.sampled_from([1, 10**3, 10**6, 10**9, 10**12]), st.sampled_from(["steps", "tokens"]))
def test_what_a_duration_prints_is_the_same_duration(number: int, factor: int, unit: str) -> None:
    span = Span(number // factor * factor, unit)  # type: ignore[arg-type]
    assert parse_span(str(span)) == span


@pytest.mark.parametrize(
    "wrong",
    [
        "200", "steps", "", "200steps", "-5 steps", "five steps", "10 MB", "10M", "1e steps", "10 X tokens", "ten epochs",
        "1,000 steps", "1_000 steps", "nan tokens", "inf tokens", "2 steps more", "1.5.2M tokens", ".5M tokens",
        "9" * 5000 + " steps", 200, 1.5, True, None, ["10 steps"], {"count": 1},
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused_with_examples(wrong: object) -> None:
    with pytest.raises(ValueError, match='expected a duration such as "200 steps" or "10M tokens"') as caught:
        parse_span(wrong)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("text", ["1.5 steps", "0.0001K tokens", "1.23456e3 steps"])
def test_parts_of_a_step_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number of"):
        parse_span(text)


@pytest.mark.parametrize("text", ["1e99 steps", "9999999T tokens", "1e19 tokens"])
def test_what_is_longer_than_any_run_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match="which no run is"):
        parse_span(text)
