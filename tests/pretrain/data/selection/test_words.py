from __future__ import annotations

import re

import numpy as np
import pytest

from pretrain.data.selection.words import ODD, Texts
from tests.pretrain.data.selection.making import page

TEXTS = [
    "Hello, world! It's 3.5 o'clock\t\tnow.",
    "",
    "   \n\n ",
    "Привет, МИР! ¿Qué tal? — “gut”\u00a0so\u2028weiter",
    "नमस्ते दुनिया, मैं यहाँ हूँ",
    "a\0b\x01c \ud800 d",
    "漢字かな 漢字",
    "x" * 300 + " " + "x" * 300 + "y",
    page(1),
]


def strings(text: str, runs: object, texts: Texts, number: int) -> list[str]:
    begin, end = runs.offsets[number : number + 2]  # type: ignore[attr-defined]
    first = texts.bounds[number]
    starts, ends = runs.starts[begin:end] - first, runs.ends[begin:end] - first  # type: ignore[attr-defined]
    return [text[a:b] for a, b in zip(starts, ends, strict=True)]


def test_words_are_those_of_split_in_every_text() -> None:
    texts = Texts(TEXTS)
    for number, text in enumerate(TEXTS):
        assert strings(text, texts.words, texts, number) == text.split()


def test_bare_words_are_letters_digits_and_marks() -> None:
    texts = Texts(TEXTS)
    assert strings(TEXTS[0], texts.bare, texts, 0) == re.findall(r"[^\W_]+", TEXTS[0])
    assert strings(TEXTS[4], texts.bare, texts, 4) == ["नमस्ते", "दुनिया", "मैं", "यहाँ", "हूँ"]
    assert strings(TEXTS[5], texts.bare, texts, 5) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("kind", ["words", "bare", "letters"])
def test_a_key_depends_on_the_word_alone(kind: str) -> None:
    together, keys = Texts(TEXTS), {}
    runs = getattr(together, kind)
    for number, text in enumerate(TEXTS):
        begin, end = runs.offsets[number : number + 2]
        alone = getattr(Texts([text]), kind)
        assert np.array_equal(alone.keys, runs.keys[begin:end])
        for word, found in zip(strings(text, runs, together, number), runs.keys[begin:end].tolist(), strict=True):
            assert keys.setdefault(word.lower(), found) == found
    assert len(set(keys.values())) == len(keys) > 10, "different words have different keys"


def test_keys_are_what_they_always_were() -> None:
    """Signatures and hashes that were written once are compared with those of later versions."""
    assert Texts(["Hello, мир"]).bare.keys.tolist() == [GOLDEN_HELLO, GOLDEN_MIR]
    assert int(Texts(["one two three"]).bare.run_keys(3)[1][0]) == GOLDEN_RUN


GOLDEN_HELLO, GOLDEN_MIR, GOLDEN_RUN = 2672664149096521704, 989662309804641338, 12929314041715092925


def test_runs_of_words_never_span_two_texts() -> None:
    texts = Texts(["a b c", "d", "", "e f"])
    first, keys = texts.words.run_keys(2)
    assert first.tolist() == [0, 1, 4] and len(set(keys.tolist())) == 3
    assert texts.words.run_keys(4)[0].tolist() == []
    assert np.array_equal(texts.words.run_keys(1)[0], np.arange(6))


def test_order_of_words_matters_in_a_run() -> None:
    one, other = (Texts([text]).words.run_keys(2)[1][0] for text in ("a b", "b a"))
    assert one != other
    assert len(set(ODD.tolist())) == 256 and (ODD % 2 == 1).all()


def test_no_texts_and_texts_without_words() -> None:
    for texts in ([], ["", " "]):
        found = Texts(texts)
        assert len(found) == len(texts) and found.words.offsets.tolist() == [0] * (len(texts) + 1)
        assert found.words.run_keys(2)[1].tolist() == []
