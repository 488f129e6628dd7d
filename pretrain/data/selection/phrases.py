"""Words and phrases that are looked for in many texts at once: letters and digits alone, whatever the case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.data.order import Words
from pretrain.data.selection.rules import Array
from pretrain.data.selection.words import Texts
from pretrain.errors import UserError


class Phrases:
    """Phrases of any numbers of words, each found where it stands between other signs."""

    def __init__(self, phrases: Sequence[str]) -> None:
        runs = Texts(phrases).bare
        sizes = np.diff(runs.offsets)
        self.keys: dict[int, Words] = {}
        for size in np.unique(sizes[sizes > 0]).tolist():
            first, keys = runs.run_keys(size)
            self.keys[size] = np.unique(keys[sizes[runs.texts[first]] == size])

    def counts(self, _: Sequence[str], texts: Texts) -> Array:
        """(D,) places where one of them stands."""
        found = np.zeros(len(texts), np.int64)
        for size, keys in self.keys.items():
            first, theirs = texts.bare.run_keys(size)
            found += texts.bare.per_text(chosen=first[among(theirs, keys)])
        return found


def among(keys: Words, sorted_keys: Words) -> Array:
    """(N,) bool: which of the keys are in the sorted ones, at least one."""
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    found: Array = sorted_keys[place] == keys
    return found


def read_phrases(path: Path) -> Phrases:
    """Of a file with one a line. Raises UserError where it cannot be read or has none."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of words: {error}") from None
    found = Phrases([line for line in lines if line.strip()])
    if not found.keys:
        raise UserError(f"{path}: holds no words; it is to have a word or phrase a line.")
    return found
