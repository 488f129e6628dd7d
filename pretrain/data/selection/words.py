"""Texts as arrays of words, many texts at once: what the rules count, and what duplicates and contamination are found by.

    points   code points of all texts, one after another, a newline before, between and behind them
    words    maximal runs of code points of a kind; a word never spans two texts
    keys     64 bits of each word, the same whatever its case: a polynomial of its letters' values (Karp and Rabin 1987), taken
             from prefix sums over all points, then mixed; the key of n words in a row is a sum of theirs, then mixed

Every step is an array operation over all words or characters, so time is linear (but for sorts) whatever the text is, and no
regular expression is matched against it. Keys are promised: the same text has the same keys on every machine, but for letters
that a later Unicode defines. Two different words, or runs, share a key with a chance of about 2^-64.

Legend: D texts, C code points, W words.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.data.order import Integers, Words, key, mix

U64 = np.uint64
Array = np.ndarray[Any, Any]
SPACE, INNER, LETTER = 1, 2, 4  # bits of a code point's kind: white space; of bare words; a letter
PLANES = 0x40000  # code points that have a kind: no letter lies beyond, but for those of private use
NEWLINE = 10
SEED = 0x5E1EC7  # of the keys
ODD: Words = key(SEED, np.arange(256)) | U64(1)  # multipliers of the words of a run
STEP = int(key(SEED, 256)) | 1  # the polynomial's base: odd, so that it can be divided by


@functools.cache
def _kinds() -> tuple[Array, Words]:
    """Kind of each code point, and the value of its lower case (its own where that is several)."""
    kinds, lower = np.zeros(PLANES, np.uint8), np.arange(PLANES)
    for point in range(PLANES - 1):
        sign = chr(point)
        mark = unicodedata.category(sign)[0] == "M"  # vowels of Indic scripts, accents: within words, as letters are
        kinds[point] = SPACE * sign.isspace() | INNER * (sign.isalnum() or mark) | LETTER * (sign.isalpha() or mark)
        small = sign.lower()
        if len(small) == 1:
            lower[point] = ord(small)
    return kinds, key(SEED, 257, lower)


@functools.lru_cache(maxsize=2)
def _powers(bits: int) -> tuple[Words, Words]:
    """STEP ** i and STEP ** -i modulo 2^64, of 2 ** bits places i."""
    bases = (STEP, pow(STEP, -1, 2**64))
    up, down = (np.cumprod(np.full(2**bits, base, np.uint64), dtype=np.uint64) for base in bases)
    return up, down


@dataclass(frozen=True)
class WordRuns:
    """Words of D texts. offsets (D + 1,): a text's first word; starts, ends (W,): places in `points`."""

    offsets: Integers
    starts: Integers
    ends: Integers
    keys: Words

    @functools.cached_property
    def lengths(self) -> Integers:
        """(W,) characters."""
        return self.ends - self.starts

    @functools.cached_property
    def texts(self) -> Integers:
        """(W,) which text each word is of."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def per_text(self, weights: Array | None = None, chosen: Array | None = None) -> Array:
        """(D,) sum of the weights (W,) of each text's chosen words; without weights their number."""
        texts = self.texts if chosen is None else self.texts[chosen]
        weights = weights if weights is None or chosen is None else weights[chosen]
        return np.bincount(texts, weights, len(self.offsets) - 1)

    def starts_of_runs(self, n: int) -> Integers:
        """Words from which n in a row are of one text."""
        last = np.arange(n - 1, len(self.texts))
        return last[self.texts[last] == self.texts[last - n + 1]] - n + 1

    def run_keys(self, n: int) -> tuple[Integers, Words]:
        """First words of all n words in a row, and their keys."""
        first = self.starts_of_runs(n)
        total = np.zeros(len(first), np.uint64)
        for place in range(n):
            total += self.keys[first + place] * ODD[place % 256]
        return first, mix(total)


class Texts:
    """D texts as code points. `words`: divided by white space; `bare`: runs of letters, digits and marks."""

    def __init__(self, texts: Sequence[str]) -> None:
        joined = "\n".join(["", *texts, ""])
        self.points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
        self.bounds = 1 + np.concatenate([[0], np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)])
        kinds, values = _kinds()
        known = self.points if self.points.max() < PLANES else np.minimum(self.points, PLANES - 1)
        self.kinds = kinds[known]
        up, self._down = _powers(max(16, len(self.points).bit_length()))
        self._sums = np.empty(len(self.points) + 1, np.uint64)
        self._sums[0] = 0
        np.cumsum(values[known] * up[: len(known)], out=self._sums[1:])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @functools.cached_property
    def words(self) -> WordRuns:
        return self._runs((self.kinds & SPACE) == 0)

    @functools.cached_property
    def bare(self) -> WordRuns:
        return self._runs((self.kinds & INNER) != 0)

    @functools.cached_property
    def letters(self) -> WordRuns:
        """Each character of the bare words as a word of its own."""
        starts = np.flatnonzero(self.kinds & INNER)
        return self._made(starts, starts + 1)

    @functools.cached_property
    def lines(self) -> tuple[Integers, Integers]:
        """First word of each line that has one, and which line of all that is."""
        line = np.searchsorted(np.flatnonzero(self.points == NEWLINE), self.words.starts)
        first = np.flatnonzero(np.diff(line, prepend=-1))
        return first, line[first]

    def _runs(self, inside: Array) -> WordRuns:
        edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
        return self._made(edges[::2], edges[1::2])

    def _made(self, starts: Integers, ends: Integers) -> WordRuns:
        keys = (self._sums[ends] - self._sums[starts]) * self._down[starts]
        return WordRuns(
            np.searchsorted(starts, self.bounds), starts, ends, mix(keys + (ends - starts).astype(np.uint64))
        )
