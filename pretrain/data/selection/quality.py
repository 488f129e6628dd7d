"""Whether a text looks like one: its length, and the measures of Gopher (Rae et al. 2021, A1.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.data.selection.config import GopherQuality, Length
from pretrain.data.selection.rules import COUNTS, SHARES, Array, Group, Rule, Scale, group_of, over
from pretrain.data.selection.words import LETTER, Texts, WordRuns

BULLETS = np.array(
    [ord(sign) for sign in "-*\u2022\u2023\u2043\u25a0\u25a1\u25aa\u25ab\u25b6\u25c0\u25cb\u25cf\u25e6\u2013"]
)
DOT, ELLIPSIS = ord("."), ord("\u2026")


def length_group(config: Length) -> Group:
    """Words and characters of a document."""
    return group_of(
        [
            (Rule("words", config.min_words, config.max_words, COUNTS), _num_words),
            (Rule("characters", config.min_characters, config.max_characters, COUNTS), _num_characters),
        ]
    )


def gopher_group(config: GopherQuality) -> Group:
    """The rules of this section that are on."""
    stop_words = Texts([" ".join(config.stop_words)]).words.keys

    def num_stop_words(_: Sequence[str], texts: Texts) -> Array:
        return _different(texts.words, np.unique(stop_words))

    least, most = config.min_word_length, config.max_word_length
    return group_of(
        [
            (Rule("words", config.min_words, config.max_words, COUNTS), _num_words),
            (Rule("mean word length", least, most, Scale(0, 20)), _word_length),
            (Rule("signs # a word", most=config.max_hashes, scale=Scale(0, 0.5)), _hashes),
            (Rule("ellipses a word", most=config.max_ellipses, scale=Scale(0, 0.5)), _ellipses),
            (Rule("lines with a bullet", most=config.max_bullet_lines, scale=SHARES), _bullet_lines),
            (Rule("lines that end with an ellipsis", most=config.max_ellipsis_lines, scale=SHARES), _ellipsis_lines),
            (Rule("words with a letter", config.min_alphabetic_words, scale=SHARES), _alphabetic),
            (Rule("different stop words", config.min_stop_words, scale=Scale(0, 16)), num_stop_words),
        ],
        "Gopher",
    )


def _num_words(_: Sequence[str], texts: Texts) -> Array:
    return np.diff(texts.words.offsets)


def _num_characters(strings: Sequence[str], _: Texts) -> Array:
    return np.array([len(text) for text in strings], np.int64)


def _word_length(_: Sequence[str], texts: Texts) -> Array:
    return over(texts.words.per_text(texts.words.lengths), np.diff(texts.words.offsets))


def _hashes(strings: Sequence[str], texts: Texts) -> Array:
    return over(np.array([text.count("#") for text in strings], np.int64), np.diff(texts.words.offsets))


def _ellipses(strings: Sequence[str], texts: Texts) -> Array:
    counts = np.array([text.count("...") + text.count("\u2026") for text in strings], np.int64)
    return over(counts, np.diff(texts.words.offsets))


def _share_of_lines(texts: Texts, first: Array, such: Array) -> Array:
    """(D,) of lines, by their first words, those that are such."""
    owners, num_texts = texts.words.texts[first], len(texts)
    return over(np.bincount(owners[such], minlength=num_texts), np.bincount(owners, minlength=num_texts))


def _bullet_lines(_: Sequence[str], texts: Texts) -> Array:
    first = texts.lines[0]
    return _share_of_lines(texts, first, np.isin(texts.points[texts.words.starts[first]], BULLETS))


def _ellipsis_lines(_: Sequence[str], texts: Texts) -> Array:
    first = texts.lines[0]
    last = np.append(first[1:], len(texts.words.starts)) - 1
    ends = texts.words.ends[last[: len(first)]]
    sign = texts.points[ends - 1] == ELLIPSIS
    dots = np.logical_and.reduce([texts.points[np.maximum(ends - back, 0)] == DOT for back in (1, 2, 3)])
    return _share_of_lines(texts, first, sign | dots)


def _alphabetic(_: Sequence[str], texts: Texts) -> Array:
    words = texts.words
    before = np.concatenate([[0], np.cumsum((texts.kinds & LETTER) != 0)])
    return over(words.per_text(chosen=before[words.ends] > before[words.starts]), np.diff(words.offsets))


def _different(words: WordRuns, keys: Array) -> Array:
    """(D,) how many of the keys a text has."""
    found = np.searchsorted(keys, words.keys)
    there = keys[np.minimum(found, len(keys) - 1)] == words.keys
    seen = np.zeros((len(words.offsets) - 1, len(keys)), bool)
    seen[words.texts[there], found[there]] = True
    return seen.sum(axis=1)
