from __future__ import annotations

from typing import Any

import pytest

from pretrain.data.selection.config import GopherQuality, Length
from tests.pretrain.data.selection.making import page, selection

OFF = {name: None for name in GopherQuality.model_fields if name != "stop_words"}


def reason(text: str, **rules: Any) -> str:
    [verdict] = selection(gopher_quality={**OFF, **rules}).judge([text])
    assert (verdict.text is None) == bool(verdict.reason)
    return verdict.reason


@pytest.mark.parametrize(
    ("name", "text", "value", "told"),
    [
        ("min_words", "a b  c\nd", 4, "words"),
        ("max_words", "a b  c\nd", 4, "words"),
        ("min_word_length", "ab abc a", 2, "mean word length"),
        ("max_word_length", "ab abc a", 2, "mean word length"),
        ("max_hashes", "#a ## b c", 0.75, "signs # a word"),
        ("max_ellipses", "a... b\u2026 c ...... d", 0.8, "ellipses a word"),
        ("max_bullet_lines", "- a\n  \u2022 b\n\nc\nd -", 0.5, "lines with a bullet"),
        ("max_ellipsis_lines", "a...\nb \u2026  \n\nc..\nd", 0.5, "lines that end with an ellipsis"),
        ("min_alphabetic_words", "a 1 -- 2b", 0.5, "words with a letter"),
        ("min_stop_words", "The the THE of ofx be.", 2, "different stop words"),
    ],
)
def test_each_rule_at_below_and_above_its_threshold(name: str, text: str, value: float, told: str) -> None:
    step = 1 if isinstance(value, int) and ("words" in name and "alphabetic" not in name) else 0.05
    worse = value + step if name.startswith("min") else value - step
    better = value - step if name.startswith("min") else value + step
    assert reason(text, **{name: value}) == "" == reason(text, **{name: better})
    assert reason(text, **{name: worse}) == f"Gopher: {told}"


def test_numbers_are_the_papers() -> None:
    found = GopherQuality().model_dump()
    assert found.pop("stop_words") == ["the", "be", "to", "of", "and", "that", "have", "with"]
    assert list(found.values()) == [50, 100_000, 3.0, 10.0, 0.1, 0.1, 0.9, 0.3, 0.8, 2]


def test_text_is_kept_and_what_is_none_is_dropped() -> None:
    chosen = selection(gopher_quality={})
    texts = [
        page(1),
        "the of " * 20,
        "#tag the of it and more " * 30,
        "1234 5678 910 the and " * 30,
        "the of\n- and " * 60,
    ]
    assert [verdict.reason for verdict in chosen.judge(texts)] == [
        "",
        "Gopher: words",
        "Gopher: signs # a word",
        "Gopher: words with a letter",
        "Gopher: mean word length",
    ]


def test_the_first_broken_rule_is_the_reason_with_its_numbers() -> None:
    [verdict] = selection(gopher_quality={}).judge(["# # #"])
    assert (verdict.reason, verdict.detail) == ("Gopher: words", "Gopher: words 3, at least 50 wanted")


@pytest.mark.parametrize("name", list(Length.model_fields))
def test_length_at_below_and_above(name: str) -> None:
    text, value = "ab cd\nef", 3 if "words" in name else 8
    worse = value + 1 if name.startswith("min") else value - 1
    found = [selection(length={name: bound}).judge([text])[0].reason for bound in (value, worse)]
    assert found == ["", name.split("_")[1]]


def test_stop_words_of_another_language() -> None:
    german = {"stop_words": ["der", "für", "und"], "min_stop_words": 2}
    assert reason("Für den Hund UND die Katze", **german) == ""
    assert reason("The dog and the cat für", **german) == "Gopher: different stop words"
