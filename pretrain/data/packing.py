"""How documents lie in the sequences that are trained on: decided when they are prepared, never by who reads them.

    concat        one document behind the other, each with its end; any sequence length is cut from that
    fit T         rows of T tokens: documents longer than T are cut into pieces of T, and the pieces are put into rows by
                  best-fit-decreasing (Ding et al. 2024, "Fewer truncations improve language modeling", section 3), so
                  that hardly a place is left over
    sentences T   rows of one document each, as many whole sentences or lines as fit. Three places of a row are left to
                  [CLS] and [SEP]s, so the text of a row is T - 3 tokens at most; only a longer sentence is cut
    pairs S T     rows of S tokens of sources and T of targets in the order of the file (`pretrain.data.pairs`)
    fit-pairs S T the same by best fit

What is left of a row is filled with document ends: an end behind an end is filler, which no objective learns from. Of `fit`
a row that ends without a document's end holds a piece whose document goes on in another row. Of `sentences` every row ends
with an end, whether its document goes on in the next row or not.

Rows are made in blocks of at most BLOCK_DOCUMENTS documents and hardly more than BLOCK_TOKENS tokens, so memory is bounded
whatever the corpus; the order of documents changes inside a block alone, and rows stand where their first documents stood.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pretrain.tokenization.base import Tokenizer

Tokens = np.ndarray[Any, Any]
Integers = np.ndarray[Any, np.dtype[np.int64]]

KINDS = {"concat": 0, "fit": 1, "sentences": 1, "pairs": 2, "fit-pairs": 2}  # and how many lengths each has
BLOCK_DOCUMENTS = 1 << 16
BLOCK_TOKENS = 1 << 24
AROUND = 3  # places of a row of sentences that [CLS] and up to two [SEP] take
LEAST = {"fit": 2, "sentences": AROUND + 1}
SENTENCE_ENDS = (".", "!", "?", "\n", "\u3002", "\uff01", "\uff1f")


@dataclass(frozen=True)
class Packing:
    """One of KINDS with its lengths in tokens. Prints as it is written in a manifest: `fit 1024`."""

    kind: str = "concat"
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if KINDS.get(self.kind) != len(self.lengths) or min(self.lengths, default=1) < LEAST.get(self.kind, 1):
            raise ValueError(f"{self} is no packing: there are concat, fit T, sentences T, pairs S T and fit-pairs S T")

    def __str__(self) -> str:
        return " ".join([self.kind, *map(str, self.lengths)])

    @classmethod
    def parse(cls, text: str) -> Packing:
        """Of "fit 1024" and the like. Raises ValueError for what is none."""
        kind, *lengths = text.split(" ")
        if not all(re.fullmatch(r"[1-9][0-9]{0,7}", length) for length in lengths):
            raise ValueError(f"{text!r} is no packing: lengths are whole numbers of tokens")
        return cls(kind, tuple(map(int, lengths)))

    @property
    def row(self) -> int:
        """Tokens that stay together: of a row, or 1 where the text is cut at any length."""
        return sum(self.lengths) or 1

    @property
    def is_pairs(self) -> bool:
        return len(self.lengths) == 2

    @property
    def is_rows_of_text(self) -> bool:
        """Whether it is text in rows that stand alone: what is behind a row does not continue it."""
        return len(self.lengths) == 1


CONCATENATED = Packing()


class Packer(Protocol):
    """Makes rows of documents. `padding`: places of the rows so far that filler takes."""

    padding: int

    def add(self, tokens: Tokens) -> Iterator[Tokens]:
        """One document's tokens with its end. Gives what is ready, each (n x row,): n whole rows one behind the other."""

    def finish(self) -> Iterator[Tokens]:
        """What is left, likewise. Documents may be added again behind it."""


def packer_of(
    packing: Packing, dtype: np.dtype[Any], eos: int, sentence_ends: np.ndarray[Any, np.dtype[np.bool_]] | None = None
) -> Packer:
    """Of text. dtype: of the tokens; eos: the document end; sentence_ends (V,): of `sentences`, see `sentence_ends`.

    What it gives depends on the documents and their order alone. Chunks of a source have a token more than their rows, so
    who writes the last row of a source writes one document end more behind it."""
    if packing.kind == "fit":
        return BestFit(packing.row, dtype, eos)
    if packing.kind == "sentences":
        if sentence_ends is None:
            raise ValueError("rows of sentences need sentence_ends")
        return Sentences(packing.row, dtype, eos, sentence_ends)
    if packing.kind == "concat":
        return Concatenated()
    raise ValueError(f"{packing} is no packing of text")


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(V,) whether a token ends a sentence or a line."""
    pieces = (tokenizer.piece(index) for index in range(tokenizer.vocab_size))
    return np.array([piece.endswith(SENTENCE_ENDS) for piece in pieces])


class Concatenated:
    """Documents as they come."""

    padding = 0

    def add(self, tokens: Tokens) -> Iterator[Tokens]:
        yield tokens

    def finish(self) -> Iterator[Tokens]:
        yield from ()


class BestFit:
    """Rows of `row` tokens, by best fit.

    Where a document's end alone would be left for a row, it is left out: behind another document's end it would be filler."""

    def __init__(self, row: int, dtype: np.dtype[Any], eos: int) -> None:
        self.row, self.dtype, self.eos = row, dtype, eos
        self.padding = 0
        self._documents: list[Tokens] = []
        self._tokens = 0

    def add(self, tokens: Tokens) -> Iterator[Tokens]:
        # A copy, since the tokens of a document are a view of those of many, which would all be kept.
        self._documents.append(np.array(tokens, self.dtype))
        self._tokens += len(tokens)
        if len(self._documents) >= BLOCK_DOCUMENTS or self._tokens >= BLOCK_TOKENS:
            yield from self.finish()

    def finish(self) -> Iterator[Tokens]:
        documents, self._documents, self._tokens = self._documents, [], 0
        if not documents:
            return
        starts, lengths = _pieces(np.fromiter(map(len, documents), np.int64, len(documents)), self.row)
        tokens = np.concatenate(documents)
        del documents
        places, count = places_of(lengths, best_fit(lengths, self.row), self.row)
        rows = np.full(count * self.row, self.eos, self.dtype)
        for start, length, place in zip(starts.tolist(), lengths.tolist(), places.tolist(), strict=True):
            rows[place : place + length] = tokens[start : start + length]
        self.padding += len(rows) - int(lengths.sum())
        if count:
            yield rows


class Sentences:
    """Rows of `row` tokens, of one document each, that end at a sentence's end where one is in reach."""

    def __init__(
        self, row: int, dtype: np.dtype[Any], eos: int, sentence_ends: np.ndarray[Any, np.dtype[np.bool_]]
    ) -> None:
        self.row, self.dtype, self.eos, self.sentence_ends = row, dtype, eos, sentence_ends
        self.padding = 0

    def add(self, tokens: Tokens) -> Iterator[Tokens]:
        text = tokens[:-1]
        cuts = self._cuts(text)
        if not len(text):
            return
        rows = np.full((len(cuts) - 1, self.row), self.eos, self.dtype)
        for row, first, last in zip(rows, cuts, cuts[1:], strict=False):
            row[: last - first] = text[first:last]
        self.padding += rows.size - len(text) - len(rows)
        yield rows.reshape(-1)

    def finish(self) -> Iterator[Tokens]:
        yield from ()

    def _cuts(self, text: Tokens) -> list[int]:
        """0, where each row's text ends, len(text)."""
        ends = (np.flatnonzero(self.sentence_ends[text]) + 1).tolist()
        cuts, most = [0], self.row - AROUND
        while len(text) - cuts[-1] > most:
            last = bisect.bisect_right(ends, cuts[-1] + most) - 1
            within = last >= 0 and ends[last] > cuts[-1]
            cuts.append(ends[last] if within else cuts[-1] + most)
        return [*cuts, len(text)]


def _pieces(lengths: Integers, row: int) -> tuple[Integers, Integers]:
    """(starts, lengths) of the pieces of documents of these lengths that lie one behind the other, in their order."""
    begins = np.cumsum(lengths) - lengths
    counts = -(-lengths // row) - (lengths % row == 1)  # without an end that is left alone
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    left = np.repeat(lengths, counts) - number * row
    return np.repeat(begins, counts) + number * row, np.minimum(left, row)


def best_fit(lengths: Integers, size: int) -> Integers:
    """Numbers (n,) of the rows of pieces of these lengths (n,), each at most `size`, by best-fit-decreasing: from the longest
    on (of like length the first) each goes into the fullest row that has room for it, or else into a new one.

    Pieces of one length are placed together: the fullest row with room for one takes as many as fit, for with each it is
    fuller still, and other rows with as much room do as it does. So the work goes with the number of different lengths and
    rooms, and at most with that of the pieces."""
    rows = np.empty(len(lengths), np.int64)
    held: dict[int, list[Integers]] = {}  # rows by the room in them
    rooms: list[int] = []  # the keys of `held`, ascending
    made = 0

    def put_back(room: int, numbers: Integers) -> None:
        if not room or not len(numbers):
            return
        if room not in held:
            held[room] = []
            bisect.insort(rooms, room)
        held[room].append(numbers)

    for pieces in _by_length(lengths):
        length = int(lengths[pieces[0]])
        while len(pieces):
            at = bisect.bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else size
            each = room // length
            needed = -(-len(pieces) // each)
            if at < len(rooms):
                numbers = held[room].pop()
                if not held[room]:
                    del held[room], rooms[at]
                put_back(room, numbers[needed:])
                numbers = numbers[:needed]
            else:
                numbers = np.arange(made, made + needed)
                made += needed
            placed, pieces = pieces[: len(numbers) * each], pieces[len(numbers) * each :]
            rows[placed] = np.repeat(numbers, each)[: len(placed)]
            last = len(placed) - (len(numbers) - 1) * each
            put_back(room - each * length, numbers[: len(numbers) - (last < each)])
            if last < each:
                put_back(room - last * length, numbers[-1:])
    return rows


def _by_length(lengths: Integers) -> list[Integers]:
    """The pieces' numbers of each length, the longest first."""
    order = np.argsort(-lengths, kind="stable")
    changes = np.flatnonzero(np.diff(lengths[order])) + 1
    return [part for part in np.split(order, changes) if len(part)]


def places_of(lengths: Integers, rows: Integers, size: int) -> tuple[Integers, int]:
    """Where each of the pieces (n,) begins when rows of `size` tokens lie one behind the other, and the number of rows. Rows
    stand in the order of their first pieces, pieces of a row in their own."""
    if not len(lengths):
        return np.empty(0, np.int64), 0
    firsts = np.unique(rows, return_index=True)[1]
    rank = np.empty_like(firsts)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    row = rank[rows]
    order = np.argsort(row, kind="stable")
    before = np.cumsum(lengths[order]) - lengths[order]  # tokens of all pieces before
    begins = np.flatnonzero(np.diff(row[order], prepend=-1))
    places = np.empty_like(order)
    places[order] = row[order] * size + before - np.repeat(before[begins], np.diff(begins, append=len(order)))
    return places, len(firsts)
