"""MinHash signatures of texts (Broder 1997), made as fast similarity sketches (Dahlgaard, Knudsen and Thorup 2017).

In a round each shingle falls into one of P places by its key; a place keeps the least value that falls into it, and rounds
go on for places that are still empty. So a long text costs a hash a shingle instead of P. What a place holds is decided by one
shingle of all that the text has, drawn alike for every text: two texts agree in a place with a chance of their Jaccard
similarity, and the share of places in which they agree estimates it.

After ROUNDS rounds (a text has few shingles then, by far fewer than P) each empty place looks at all of them by itself.

The values are a promise, held by a test: nothing here is a library's, so signatures are comparable for good. (rensa computes
the same kind of sketch; its values changed between 0.4 and 0.5, and its threads do not survive a fork.)

Legend: D texts, P permutations, S shingles of all texts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pretrain.data.order import Integers, Words, key, mix
from pretrain.data.selection.words import Texts, WordRuns

U64 = np.uint64
ROUNDS = 4
SEED = 0x51676E  # of all places and values
EMPTY = np.uint32(2**32 - 1)
Signatures = np.ndarray[Any, np.dtype[np.uint32]]


def shingles(texts: Texts, unit: str, size: int) -> tuple[Integers, Words]:
    """Which text each shingle is of, ascending, and its key, (S,) each. A text shorter than a shingle is one by itself."""
    runs = texts.bare if unit == "words" else texts.letters
    first, keys = runs.run_keys(size)
    owners, short = runs.texts[first], _short(runs, size)
    if not short.any():
        return owners, keys
    theirs = np.flatnonzero(short[runs.texts])
    place = theirs - runs.offsets[:-1][runs.texts[theirs]]
    sums = np.zeros(len(short), np.uint64)
    np.add.at(sums, runs.texts[theirs], runs.keys[theirs] * key(SEED, place))
    owners, keys = np.concatenate([owners, np.flatnonzero(short)]), np.concatenate([keys, mix(sums[short])])
    order = np.argsort(owners, kind="stable")
    return owners[order], keys[order]


def _short(runs: WordRuns, size: int) -> Any:
    """(D,) whether a text has fewer words than a shingle."""
    return np.diff(runs.offsets) < size


def sketch(owners: Integers, keys: Words, num_texts: int, permutations: int) -> Signatures:
    """(D, P) uint32 signatures of texts whose shingles' owners are ascending; each text has at least one."""
    found = np.full(num_texts * permutations, EMPTY)
    for turn in range(ROUNDS):
        hashed = mix(keys + key(SEED, turn))
        cells = owners * permutations + (((hashed >> U64(32)) * U64(permutations)) >> U64(32)).astype(np.int64)
        _keep_least(found, cells, _values(hashed))
        empty = (found == EMPTY).reshape(num_texts, permutations).any(axis=1)
        if not empty.any():
            break
        chosen = empty[owners]
        owners, keys = owners[chosen], keys[chosen]
    else:
        _fill(found, owners, keys, permutations)
    return found.reshape(num_texts, permutations)


def _values(hashed: Words) -> Signatures:
    """The value of each hash: EMPTY is none."""
    return np.minimum(hashed & U64(0xFFFFFFFF), U64(EMPTY - 1)).astype(np.uint32)


def _keep_least(found: Signatures, cells: Integers, values: Signatures) -> None:
    """Each cell that is EMPTY gets the least value that falls into it."""
    free = found[cells] == EMPTY
    np.minimum.at(found, cells[free], values[free])


def _fill(found: Signatures, owners: Integers, keys: Words, permutations: int) -> None:
    """Each cell that is still EMPTY: the least value of all of its text's shingles under the cell's own hash."""
    places, counts = np.unique(owners, return_counts=True)
    starts = np.cumsum(counts) - counts
    for start, count, text in zip(starts.tolist(), counts.tolist(), places.tolist(), strict=True):
        row = found[text * permutations : (text + 1) * permutations]
        empty = np.flatnonzero(row == EMPTY)
        if len(empty):
            own = key(SEED, ROUNDS + empty)[:, None]
            row[empty] = _values(mix(keys[None, start : start + count] + own)).min(axis=1)


def signatures(texts: Texts, unit: str, size: int, permutations: int) -> Signatures:
    """(D, P) of the texts. Raises nothing: a text without a letter or digit is the sketch of one shingle, nothing."""
    return sketch(*shingles(texts, unit, size), len(texts), permutations)


def band_keys(found: Signatures, bands: int) -> Words:
    """(bands, D): a key of each band of each signature (D, P); signatures that agree in a band share it."""
    rows = found.reshape(len(found), bands, -1).astype(np.uint64)
    multipliers = key(SEED, 1 << 32, np.arange(rows.shape[2])) | U64(1)
    sums = (mix(rows + U64(1)) * multipliers).sum(axis=2, dtype=np.uint64)
    return mix(sums + key(SEED, 1 << 33, np.arange(bands))).T.copy()
