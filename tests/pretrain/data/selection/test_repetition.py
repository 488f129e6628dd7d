from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from pretrain.data.selection.config import GopherRepetition
from pretrain.data.selection.repetition import measures
from pretrain.data.selection.words import Texts
from tests.pretrain.data.selection.making import draws, page, selection

NAMES = set(GopherRepetition.model_fields)


def found(text: str, beside: Sequence[str] = ()) -> dict[str, float]:
    """Measured together with other texts, which must not matter."""
    return {name: float(values[len(beside)]) for name, values in measures(Texts([*beside, text, *beside]), NAMES)}


def copies(parts: Sequence[str]) -> list[str]:
    return [part for place, part in enumerate(parts) if part in parts[:place]]


def plainly(text: str) -> dict[str, float]:
    """The measures by the words of their definitions."""
    lines = [" ".join(line.lower().split()) for line in text.split("\n")]
    paragraphs = [" ".join(part.split("\n")).strip() for part in "\n".join(lines).split("\n\n")]
    values = {}
    for name, parts in (("line", lines), ("paragraph", paragraphs)):
        parts = [" ".join(part.split()) for part in parts if part.strip()]
        size = sum(map(len, parts))
        values[f"duplicate_{name}s"] = len(copies(parts)) / max(len(parts), 1)
        values[f"duplicate_{name}_characters"] = sum(map(len, copies(parts))) / max(size, 1)
    words = text.lower().split()
    for n in range(2, 11):
        grams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
        counts = Counter(grams)
        if n < 5:
            several = [
                (count, sum(map(len, gram)), -grams.index(gram), gram) for gram, count in counts.items() if count > 1
            ]
            top = max(several)[-1] if several else None
            starts = [place for place, gram in enumerate(grams) if gram == top]
            name = f"top_{n}_gram"
        else:
            starts = [place for place, gram in enumerate(grams) if gram in grams[:place]]
            name = f"duplicate_{n}_grams"
        inside = {place for start in starts for place in range(start, start + n)}
        values[name] = sum(len(words[place]) for place in inside) / max(sum(map(len, words)), 1)
    return values


def loops(number: int) -> str:
    """Text of few words, so that much repeats, with lines and paragraphs of them."""
    signs = " \n \n\n  \n \n" + " " * 8 * (number % 5)
    parts = []
    for place, value in enumerate(draws(number, 40 + 10 * number, 4 + number)):
        parts += ["abcdefghijklmnopqrstuvwxyz"[value] * (1 + value % 4), signs[(place * place + number) % len(signs)]]
    return "".join(parts)


@pytest.mark.parametrize("number", range(12))
def test_all_measures_are_what_their_definitions_say(number: int) -> None:
    for text in (loops(number), page(number), "a b c " * number, f"{page(number, 60)}\n\n" * 3):
        assert found(text, ["", loops(3), page(77)]) == pytest.approx(plainly(text), abs=1e-12)


def test_case_and_amount_of_white_space_do_not_matter() -> None:
    text = "One line here\none  LINE\there \n\n\n \nanother line"
    assert found(text)["duplicate_lines"] == 1 / 3
    assert found("One\n\ntwo\n \nONE\n")["duplicate_paragraphs"] == 1 / 3


def test_the_same_line_in_two_texts_is_no_copy() -> None:
    assert set(found(page(1, 60), [page(1, 60)]).values()) == set(found(page(1, 60)).values())


def test_nothing_repeats_in_nothing() -> None:
    for text in ("", " \n\n ", "one"):
        assert set(found(text).values()) == {0.0}


def broken(text: str, **thresholds: float) -> str:
    """The reason for which these rules alone drop the text."""
    only = {**dict.fromkeys(NAMES), **thresholds}
    [verdict] = selection(gopher_repetition=only).judge([text])
    return verdict.reason


EXAMPLES = {
    "duplicate_lines": "a\nb\nc\na\nb",  # 2 of 5
    "duplicate_paragraphs": "a\n\nb\n\nc\n\na\n\nb",
    "duplicate_line_characters": "aa\nbb\nccc\nddd\naa",  # 2 of 12
    "duplicate_paragraph_characters": "aa\n\nbb\n\nccc\n\nddd\n\naa",
    "top_2_gram": "a b c d a b e f g h",  # 4 of 10
    "top_3_gram": "a b c d a b c f g h",
    "top_4_gram": "a b c d a b c d g h",
    **{f"duplicate_{n}_grams": " ".join([*"abcdefghij"[:n], "z", *"abcdefghij"[:n], "y"]) for n in range(5, 11)},
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_rule_at_below_and_above_its_threshold(name: str) -> None:
    text = EXAMPLES[name]
    value = plainly(text)[name]
    assert 0 < value < 1
    assert broken(text, **{name: value}) == ""
    assert broken(text, **{name: value + 0.01}) == ""
    assert broken(text, **{name: value - 0.01}) == f"Gopher: {name.replace('_', ' ')}"


def test_thresholds_are_the_papers() -> None:
    numbers = [0.30, 0.30, 0.20, 0.20, 0.20, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    assert list(GopherRepetition().model_dump().values()) == numbers
