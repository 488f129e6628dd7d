"""How much of a text repeats itself, by the measures of Gopher (Rae et al. 2021, A1.1 and table A1).

Words are divided by white space and lines by line ends; lines without a word do not count, and paragraphs are runs of lines
between such. Case and the amount of white space do not matter. Of lines, paragraphs and n-grams that occur several times all
but the first are duplicates; the most frequent n-gram (the longest of several) counts with all its places. A word that lies in
several n-grams is counted once. An n-gram can only be there twice if both (n - 1)-grams in it are, so each n looks at the
places that the one before has left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pretrain.data.order import Integers, Words, key, mix
from pretrain.data.selection.config import GopherRepetition
from pretrain.data.selection.rules import SHARES, Array, Group, Rule, over
from pretrain.data.selection.words import ODD, U64, Texts, WordRuns

TOP, LONGEST = (2, 3, 4), 10


class Spans(NamedTuple):
    """Lines or paragraphs of all texts: which text each is of, its characters, and its key."""

    texts: Integers
    lengths: Integers
    keys: Words


class Copies(NamedTuple):
    """Places (N,) whose keys occur several times, in groups: `group` ascends, and within one the places do."""

    places: Integers
    group: Integers
    later: Array  # bool: not its group's first


def group(config: GopherRepetition) -> Group:
    """The rules of this section that are on."""
    names = [name for name in type(config).model_fields if getattr(config, name) is not None]
    rules = tuple(Rule(f"Gopher: {name.replace('_', ' ')}", most=getattr(config, name), scale=SHARES) for name in names)

    def measure(_: Sequence[str], texts: Texts) -> Array:
        found = dict(measures(texts, set(names)))
        return np.stack([found[name] for name in names], axis=1) if names else np.zeros((len(texts), 0))

    return Group(rules, measure)


def measures(texts: Texts, names: set[str]) -> Iterator[tuple[str, Array]]:
    """(D,) of each measure, by its name in the section. names: those that are wanted."""
    kinds = {name.split("_")[1].rstrip("s") for name in names}
    if kinds & {"line", "paragraph"}:
        lines, paragraphs = spans(texts)
        for kind, found in (("line", lines), ("paragraph", paragraphs)):
            later = _later(found.keys, found.texts)
            share, characters = _shares(found, later, len(texts))
            yield f"duplicate_{kind}s", share
            yield f"duplicate_{kind}_characters", characters
    sizes = [n for n in range(2, LONGEST + 1) if {f"top_{n}_gram", f"duplicate_{n}_grams"} & names]
    if sizes:
        yield from _ngrams(texts.words, len(texts), max(sizes))


def spans(texts: Texts) -> tuple[Spans, Spans]:
    """Lines and paragraphs."""
    words, (first, line) = texts.words, texts.lines
    lines = _joined(words, first)
    gaps = np.diff(line, prepend=-2) > 1
    gaps |= np.diff(lines.texts, prepend=-1) > 0
    return lines, _joined(words, first[gaps])


def _joined(words: WordRuns, first: Integers) -> Spans:
    """Spans that begin with these words and end before the next. Their characters: of words, and a space between two."""
    counts = np.diff(first, append=len(words.starts))
    place = np.arange(len(words.starts)) - np.repeat(first, counts)
    values = words.keys * (mix(place) | U64(1))
    sums = np.add.reduceat(values, first) if len(first) else values
    letters = np.add.reduceat(words.lengths, first) if len(first) else words.lengths
    return Spans(words.texts[first], letters + counts - 1, mix(sums))


def _copies(keys: Words, places: Integers) -> Copies:
    """Of these places, ascending, those whose key is not alone."""
    if not len(keys):
        return Copies(places, places, np.zeros(0, bool))
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = np.concatenate([[False], ordered[1:] == ordered[:-1], [False]])
    kept = same[1:] | same[:-1]
    later = same[:-1][kept]
    return Copies(places[order][kept], np.cumsum(~later) - 1, later)


def _later(keys: Words, texts: Integers) -> Array:
    """(N,) bool: whether the text has had this key before."""
    found = _copies(mix(keys + key(texts)), np.arange(len(keys)))
    later = np.zeros(len(keys), bool)
    later[found.places[found.later]] = True
    return later


def _shares(found: Spans, later: Array, num_texts: int) -> tuple[Array, Array]:
    """(D,) share of spans, and of their characters, that were there before."""

    def share(weights: Array) -> Array:
        parts = np.bincount(found.texts[later], weights[later], num_texts)
        return over(parts, np.bincount(found.texts, weights, num_texts))

    return share(np.ones(len(later))), share(found.lengths)


def _ngrams(words: WordRuns, num_texts: int, longest: int) -> Iterator[tuple[str, Array]]:
    """The measures of n-grams up to the longest."""
    total, salt = words.per_text(words.lengths), key(np.arange(num_texts))
    places = words.starts_of_runs(2)
    sums = words.keys[places] * ODD[0] + words.keys[places + 1] * ODD[1]
    for n in range(2, longest + 1):
        if n > 2:
            places, sums = _extended(words, places, sums, n)
        found = _copies(mix(sums + salt[words.texts[places]]), places)
        if n in TOP:
            yield f"top_{n}_gram", over(_covered(words, _top(words, found, n), n), total)
        else:
            yield f"duplicate_{n}_grams", over(_covered(words, found.places[found.later], n), total)
        kept = np.isin(places, found.places, assume_unique=True)
        places, sums = places[kept], sums[kept]


def _extended(words: WordRuns, places: Integers, sums: Words, n: int) -> tuple[Integers, Words]:
    """n-grams at those places, ascending, of (n - 1)-grams whose next place is one of too; so they are within a text."""
    chosen = np.flatnonzero(places[1:] == places[:-1] + 1)
    return places[chosen], sums[chosen] + words.keys[places[chosen] + n - 1] * ODD[n - 1]


def _top(words: WordRuns, found: Copies, n: int) -> Integers:
    """Places of each text's most frequent n-gram; of several the one of most characters, then the first."""
    if not len(found.places):
        return found.places
    first = np.flatnonzero(~found.later)
    counts = np.diff(first, append=len(found.places))
    before = np.concatenate([[0], np.cumsum(words.lengths)])
    start = found.places[first]
    characters = before[start + n] - before[start]
    texts = words.texts[start]
    best = np.lexsort((-start, characters, counts, texts))
    best = best[np.append(texts[best][1:] != texts[best][:-1], True)]
    return found.places[np.isin(found.group, best)]


def _covered(words: WordRuns, places: Integers, n: int) -> Array:
    """(D,) characters of the words in the n-grams that begin at these places, each word once."""
    if not len(places):
        return np.zeros(len(words.offsets) - 1)
    ends = np.zeros(len(words.starts) + 1, np.int64)
    ends[places] += 1
    ends[places + n] -= 1
    return words.per_text(words.lengths, np.cumsum(ends[:-1]) > 0)
