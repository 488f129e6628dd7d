"""Texts for the tests, each a pure function of its number; and pieces of a corpus through all stages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.order import key
from pretrain.data.selection.clusters import Summary, cluster
from pretrain.data.selection.config import SelectionConfig
from pretrain.data.selection.fates import fates_path, read_fates
from pretrain.data.selection.select import Selection, Verdict
from pretrain.data.selection.signatures import SignatureWriter

VOCABULARY = 5000
STOP = ("the", "be", "to", "of", "and", "that", "have", "with")


def selection(**sections: Any) -> Selection:
    """Of sections as a file has them."""
    return Selection(SelectionConfig.model_validate({"version": 1, **sections}))


def draws(number: int, count: int, size: int) -> list[int]:
    """Numbers below size."""
    found: list[int] = (key(number, np.arange(count)) % np.uint64(size)).astype(int).tolist()
    return found


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """A language of its own: one in four draws is a stop word."""
    letters = draws(9, 4 * VOCABULARY, 26)
    spelled = ["".join(chr(97 + letters[4 * number + place]) for place in range(4)) for number in range(VOCABULARY)]
    return tuple(f"{word}{chr(97 + number % 26)}{chr(97 + number // 26 % 26)}" for number, word in enumerate(spelled))


def words(number: int, count: int) -> list[str]:
    """The number-th text's."""
    return [STOP[n % 8] if n % 4 == 0 else vocabulary()[n // 4] for n in draws(number, count, 4 * VOCABULARY)]


def page(number: int, count: int = 200) -> str:
    """Sentences of ten words, a paragraph each five."""
    found = words(number, count)
    sentences = [" ".join(found[first : first + 10]).capitalize() + "." for first in range(0, count, 10)]
    return "\n\n".join(" ".join(sentences[first : first + 5]) for first in range(0, len(sentences), 5))


def changed(text: str, number: int, every: int) -> str:
    """The text with one word of `every` replaced, or one at least."""
    found = text.split(" ")
    for turn, place in enumerate(draws(number, max(len(found) // every, 1), len(found))):
        found[place] = f"other{number}x{turn}"
    return " ".join(found)


def jaccard(one: str, other: str, size: int = 5) -> float:
    """Of their shingles of words."""
    a, b = (
        {tuple(bare[place : place + size]) for place in range(len(bare) - size + 1)}
        for bare in ("".join(c if c.isalnum() else " " for c in text.lower()).split() for text in (one, other))
    )
    return len(a & b) / len(a | b)


def signed(chosen: Selection, texts: Sequence[str], path: Path, batch: int = 7) -> Path:
    """A piece's file of signatures, made batch by batch."""
    with SignatureWriter(path, chosen.fingerprint, chosen.config.near) as writer:
        for first in range(0, len(texts), batch):
            writer.add(chosen.sign(texts[first : first + batch]))
    return path


def judged(
    chosen: Selection, pieces: Sequence[Sequence[str]], folder: Path, batch: int = 7, **options: Any
) -> tuple[list[Verdict], Summary]:
    """What becomes of all documents of a corpus."""
    folder.mkdir()
    files = {number: signed(chosen, texts, folder / f"{number}.sign", batch) for number, texts in enumerate(pieces)}
    summary = cluster(files, folder / "fates", chosen.config, chosen.fingerprint, **options)
    verdicts = []
    for number, texts in enumerate(pieces):
        fates = read_fates(fates_path(folder / "fates", number))
        for first in range(0, len(texts), batch):
            verdicts += chosen.judge(texts[first : first + batch], fates[first : first + batch])
    return verdicts, summary
