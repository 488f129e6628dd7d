"""Word pieces, words and windows: pure functions of character offsets.

Pieces are given by (P,) arrays `starts` and `ends`, the characters of the text that each covers, in order; a piece may
cover white space before its word, or nothing (a byte of a longer character). Words are given the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.errors import UserError
from pretrain.tasks.labels import OUTSIDE

Array = np.ndarray[Any, Any]
IGNORED = -100  # target of a piece that the loss leaves out
NO_WORD = -1
Window = tuple[int, int]  # first piece, piece after the last


def joined(tokens: Sequence[str]) -> tuple[str, Array, Array]:
    """A sentence's tokens as a text with single spaces between them, and (W,) starts and ends of each in it."""
    lengths = np.array([len(token) for token in tokens], np.int64)
    starts = np.cumsum(lengths + 1) - lengths - 1
    return " ".join(tokens), starts, starts + lengths


def words_of_pieces(starts: Array, ends: Array, word_starts: Array, word_ends: Array) -> Array:
    """(P,) number of the first word that shares a character with each piece, NO_WORD if none does."""
    words = np.full(len(starts), NO_WORD, np.int64)
    held = np.flatnonzero(word_ends > word_starts)  # empty words have no pieces
    if len(held):
        place = np.searchsorted(word_ends[held], starts, side="right")
        word = held[np.minimum(place, len(held) - 1)]
        meets = (place < len(held)) & (ends > starts) & (word_starts[word] < ends)
        words[meets] = word[meets]
    return words


def first_pieces(words: Array, num_words: int) -> Array:
    """(W,) number of each word's first piece, -1 for a word without pieces. words: as of `words_of_pieces`."""
    first = np.full(num_words, -1, np.int64)
    pieces = np.flatnonzero(words != NO_WORD)[::-1]  # backwards, so that the first is written last
    first[words[pieces]] = pieces
    return first


def piece_targets(first: Array, tags: Sequence[int], num_pieces: int) -> Array:
    """(P,) tag numbers: a word's on its first piece, IGNORED elsewhere."""
    targets = np.full(num_pieces, IGNORED, np.int64)
    has_pieces = first >= 0
    targets[first[has_pieces]] = np.asarray(tags, np.int64)[has_pieces]
    return targets


def word_tags(first: Array, predicted: Sequence[int] | Array, names: Sequence[str]) -> list[str]:
    """A tag for every word: that predicted for its first piece, O for a word without pieces."""
    return [names[int(predicted[piece])] if piece >= 0 else OUTSIDE for piece in first]


def windows(num_pieces: int, length: int, overlap: int) -> list[Window]:
    """Windows of at most `length` pieces that cover all; each begins `overlap` pieces before the last one's end.

    (transformers calls the overlap stride; BERT's doc_stride is length - overlap.)
    """
    if not 0 <= overlap < length:
        raise ValueError(f"an overlap of {overlap} pieces in windows of {length}")
    starts = range(0, max(1, num_pieces - overlap), length - overlap)
    return [(start, min(start + length, num_pieces)) for start in starts]


def passage_room(place: str, num_question: int, num_special: int, length: int, overlap: int) -> int:
    """Pieces of the passage that fit beside the question. Raises UserError, beginning with the place, if too few."""
    room = length - num_question - num_special
    if room <= overlap:
        raise UserError(
            f"{place}: the question has {num_question} word pieces, which leave {max(room, 0)} of the window's {length} for the "
            f"passage, not more than the overlap of {overlap}; lengthen the window or shorten question or overlap."
        )
    return room


def owners(found: Sequence[Window], num_pieces: int) -> Array:
    """(P,) the window in which each piece has the most context on its shorter side; of equal ones the first.

    So every piece is predicted in exactly one window, and not at a window's edge where another holds it inside.
    """
    owner = np.zeros(num_pieces, np.int64)
    most = np.full(num_pieces, -1, np.int64)
    for number, (start, end) in enumerate(found):
        inside = np.arange(start, end)
        context = np.minimum(inside - start, end - 1 - inside)
        better = context > most[start:end]
        owner[start:end][better] = number
        most[start:end][better] = context[better]
    return owner


def assembled(found: Sequence[Window], predicted: Sequence[Array], num_pieces: int) -> Array:
    """(P,) predictions of the whole from (window,) predictions of each window, each piece's from its owner."""
    owner = owners(found, num_pieces)
    whole = np.zeros(num_pieces, np.int64)
    for number, ((start, end), values) in enumerate(zip(found, predicted, strict=True)):
        mine = owner[start:end] == number
        whole[start:end][mine] = np.asarray(values)[mine]
    return whole
