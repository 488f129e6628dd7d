"""A sample as the model will see it: its documents with their places and positions, what is hidden or not predicted, filler.

In colour on a terminal, and with marks around the words where there are no colours. Text comes from elsewhere, so nothing of
it reaches a terminal raw.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from pretrain.printable import printable
from pretrain.tokenization.base import Tokenizer

Array = np.ndarray[Any, Any]
FILLER, SPECIAL, MASKED, RANDOM, KEPT, NOT_PREDICTED = "filler", "special", "masked", "random", "kept", "not predicted"
STYLES = {
    SPECIAL: "dim",
    MASKED: "black on red",
    RANDOM: "black on magenta",
    KEPT: "black on green",
    NOT_PREDICTED: "cyan",
}
FORMS = {MASKED: "«{}»", RANDOM: "«{}»", KEPT: "«={}»", NOT_PREDICTED: "({})"}
LEGEND = {
    MASKED: "hidden behind the mask, to be predicted",
    RANDOM: "to be predicted, and the token that stands there instead",
    KEPT: "to be predicted, though it stands there",
    NOT_PREDICTED: "not predicted",
}


class Row(NamedTuple):
    """A sequence of S tokens that the model reads or predicts. All arrays (S,)."""

    name: str  # which sequence it is
    tokens: Array  # ids of the text
    shown: Array  # ids that the model reads
    marks: list[str]  # of each token, or ""
    documents: Array  # numbers
    begins_anew: bool  # positions begin with each document, and none sees another
    segments: Array | None = None  # of a pair of segments, 0 or 1


class Part(NamedTuple):
    text: str
    mark: str


class Block(NamedTuple):
    """What stands together in a row: a document, or a segment of one, or filler."""

    first: int
    last: int
    segment: int
    parts: list[Part]


def plain_row(tokens: Array, eos: int, packed: bool) -> Row:
    """Tokens (S,) without an objective. packed: a document end at the beginning fills the row."""
    fills = filler(tokens, eos, packed)
    return Row("text", tokens, tokens, [FILLER if full else "" for full in fills], documents_of(tokens, eos), False)


def filler(tokens: Array, eos: int, packed: bool) -> Array:
    """(S,) bool: document ends behind document ends."""
    ends = tokens == eos
    return ends & np.concatenate([[packed], ends[:-1]])


def documents_of(tokens: Array, eos: int) -> Array:
    """(S,) numbers; a document's end is its last token."""
    ends = (tokens == eos).astype(np.int64)
    return np.cumsum(ends) - ends


class Speller:
    """Words of ids. names: of ids that are symbols, by id."""

    def __init__(self, tokenizer: Tokenizer, names: Mapping[int, str]) -> None:
        self.tokenizer, self.names = tokenizer, names

    def one(self, index: int) -> str:
        """A token by itself."""
        return self.names.get(index) or self.tokenizer.decode([index]) or self.tokenizer.piece(index)

    def blocks(self, row: Row) -> Iterator[Block]:
        """The row in blocks, in order."""
        segments = np.zeros_like(row.tokens) if row.segments is None else row.segments
        places = zip(row.documents.tolist(), segments.tolist(), (mark == FILLER for mark in row.marks), strict=True)
        keys = [("filler",) if full else (document, segment) for document, segment, full in places]
        for _, group in itertools.groupby(range(len(keys)), keys.__getitem__):
            first, *rest = group
            last = rest[-1] if rest else first
            yield Block(first, last, int(segments[first]), list(self._parts(row, first, last + 1)))

    def _parts(self, row: Row, first: int, end: int) -> Iterator[Part]:
        if row.marks[first] == FILLER:
            return
        alone = [i if row.marks[i] in (RANDOM, SPECIAL) else -1 for i in range(first, end)]
        keys = list(zip(row.marks[first:end], alone, strict=True))
        cuts = [0, *(i for i in range(1, end - first) if keys[i] != keys[i - 1]), end - first]
        texts = self._texts(row.tokens[first:end].tolist(), cuts)
        for text, (start, _) in zip(texts, itertools.pairwise(cuts), strict=True):
            mark = row.marks[first + start]
            if mark == RANDOM:
                text = f"{text}|{self.one(int(row.shown[first + start]))}"
            elif mark == SPECIAL:
                text = self.one(int(row.tokens[first + start]))
            yield Part(text, mark)

    def _texts(self, ids: list[int], cuts: Sequence[int]) -> Iterator[str]:
        """The text between each two cuts, as it reads behind what is before it: a tokenizer may leave out a space at the
        beginning, or need several tokens for a character."""
        known = [index if index < self.tokenizer.vocab_size and index not in self.names else -1 for index in ids]

        def decoded(start: int, end: int) -> str:
            return self.tokenizer.decode([index for index in known[start:end] if index >= 0])

        before = ""
        for start, end in itertools.pairwise(cuts):
            whole = decoded(0, end)
            yield whole[len(before) :] if whole.startswith(before) else decoded(start, end)
            before = whole


def tell_row(row: Row, speller: Speller, console: Console) -> None:
    """Print it."""
    coloured = has_colour(console)
    blocks = list(speller.blocks(row))
    starts: dict[int, int] = {}  # where each document begins
    for block in blocks:
        starts.setdefault(int(row.documents[block.first]), block.first)
    number, of = 0, len({int(row.documents[block.first]) for block in blocks if block.parts})
    told: set[int] = set()
    for block in blocks:
        place = f"tokens {block.first:,} to {block.last:,}"
        if not block.parts:
            console.print(f"--- filler: {block.last - block.first + 1:,} document ends ({place})")
            continue
        document = int(row.documents[block.first])
        number += document not in told
        told.add(document)
        segment = "" if row.segments is None else f", segment {'AB'[block.segment]}"
        base = starts[document] if row.begins_anew else 0
        anew = f"{place}, positions {block.first - base:,} to {block.last - base:,}"
        console.print(f"--- document {number} of {of}{segment}: {anew if row.begins_anew else place}")
        _print(block.parts, coloured, console)


def has_colour(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def legend(marks: set[str], console: Console) -> None:
    """What the marks that occur mean."""
    coloured = has_colour(console)
    for mark in (mark for mark in LEGEND if mark in marks):
        word = "word|other" if mark == RANDOM else "word"
        example = Text(word, STYLES[mark]) if coloured else Text(FORMS[mark].format(word))
        console.print(Text.assemble("  ", example, f"  {LEGEND[mark]}"))


def _print(parts: Sequence[Part], coloured: bool, console: Console) -> None:
    if coloured:
        shown = [(printable(part.text, "\n\t"), STYLES.get(part.mark, "")) for part in parts]
        console.print(Text.assemble(*shown))
        return
    text = "".join(FORMS.get(part.mark, "{}").format(printable(part.text, "\n\t")) for part in parts)
    console.file.write(text + "\n")  # as it is: the console would make spaces of tabs
