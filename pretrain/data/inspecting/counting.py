"""What the tokens of a source are: lengths of documents, duplicates, how often each id stands, what fills rows.

Small sources are counted whole. Of large ones RUNS runs of neighbouring chunks are, always the same ones: a document that
begins in a run and ends in it is counted, one that its border cuts is not. Memory stays bounded: of documents a hash of
eight bytes is kept, of the first MOST_HASHES; different lengths cannot be more than the square root of twice the tokens.

A document is counted with its end. A document end behind a document end is no document: it fills what is left of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from pretrain.data import shards as layout
from pretrain.data.manifest import Manifest
from pretrain.data.order import permute
from pretrain.data.remote.chunks import open_chunks

EXACT_TOKENS = 1 << 25  # up to here all are counted: seconds
RUNS, RUN_TOKENS = 16, 1 << 21  # else so many runs of so many tokens, as many together
MOST_HASHES = 1 << 23

Array = np.ndarray[Any, Any]


@dataclass
class Counts:
    """Of `tokens` tokens in `chunks` chunks of the source."""

    ids: Array  # (V,) int64: how often each id stands
    is_whole: bool  # nothing of the source was left out
    chunks: int = 0
    tokens: int = 0
    filler: int = 0  # document ends behind document ends
    documents: int = 0
    cut: int = 0  # documents that a run's border cuts, not counted
    lengths: Counter[int] = field(default_factory=Counter)  # tokens of a document, its end among them -> documents
    hashed: int = 0  # documents of which duplicates were looked for
    duplicates: int = 0  # of those, the ones that equal an earlier one
    most_copies: int = 0  # of one document


def count(manifest: Manifest, tell: Callable[[int], None] = lambda _: None) -> Counts:
    """Read and count. tell: is given the tokens of each chunk that was read. Raises UserError naming a bad chunk."""
    runs = chosen_runs(manifest)
    whole = runs == [(0, manifest.chunks)]
    counting = _Counting(manifest, Counts(np.zeros(manifest.vocab_size, np.int64), whole))
    [chunks], ahead = open_chunks([manifest], cache_bytes=0)  # each is read once
    try:
        for first, last in runs:
            counting.begin(first)
            for chunk in range(first, last):
                tokens = chunks.tokens(chunk, 0, own_tokens(chunk, manifest))
                counting.add(tokens)
                tell(len(tokens))
            counting.end()
    finally:
        chunks.close()
        if ahead is not None:
            ahead.close()
    return counting.finish()


def chosen_runs(manifest: Manifest) -> list[tuple[int, int]]:
    """The chunks that are counted, as (first, last + 1), in their order: all, or RUNS runs chosen by a hash."""
    if manifest.tokens <= EXACT_TOKENS:
        return [(0, manifest.chunks)]
    size = max(RUN_TOKENS // manifest.tokens_per_chunk, 1)
    places = manifest.chunks // size
    if places <= RUNS:
        return [(0, manifest.chunks)]
    chosen = np.sort(permute(np.arange(RUNS), places, 0))
    return [(place * size, (place + 1) * size) for place in chosen.tolist()]


def own_tokens(chunk: int, manifest: Manifest) -> int:
    """Tokens of a chunk without its look-ahead, which is the next one's first; the last chunk has none."""
    values = layout.chunk_values(chunk, manifest)
    return values if chunk == manifest.chunks - 1 else values - 1


class _Counting:
    """Cuts a run of chunks into documents and counts them."""

    def __init__(self, manifest: Manifest, counts: Counts) -> None:
        self.counts, self.eos = counts, manifest.eos
        self.hashes: list[Array] = []
        self.open: xxhash.xxh3_64 | None = None  # the document under way; None: its beginning was not seen
        self.length = 0  # of it, so far
        self.after_end = False  # whether the last token was a document end

    def begin(self, chunk: int) -> None:
        """A run begins with this chunk: in the middle of a document, unless it is the first."""
        self.open, self.length = (xxhash.xxh3_64() if chunk == 0 else None), 0
        self.after_end = chunk == 0

    def add(self, tokens: Array) -> None:
        """The next chunk's (n,)."""
        counts, is_end = self.counts, tokens == self.eos
        counts.chunks += 1
        counts.tokens += len(tokens)
        counts.ids += np.bincount(tokens, minlength=len(counts.ids))
        behind = np.concatenate([[self.after_end], is_end[:-1]])
        counts.filler += int(np.count_nonzero(is_end & behind))
        self.after_end = bool(is_end[-1])
        data, width = np.ascontiguousarray(tokens).data.cast("B"), tokens.dtype.itemsize
        ends = np.flatnonzero(is_end)
        if not ends.size:
            self._go_on(data, len(tokens))
            return
        first, last = int(ends[0]), int(ends[-1])
        self._go_on(data[: first * width], first)
        self._close()
        self._whole(data, ends, width)
        self.open, self.length = xxhash.xxh3_64(), 0
        self._go_on(data[(last + 1) * width :], len(tokens) - last - 1)

    def _go_on(self, data: memoryview, length: int) -> None:
        if self.open is not None:
            self.open.update(data)
            self.length += length

    def _close(self) -> None:
        """The document under way ends with the next token."""
        if self.open is not None and self.length:
            self.counts.documents += 1
            self.counts.lengths[self.length + 1] += 1
            self._hashed(np.array([self.open.intdigest()], np.uint64))

    def _whole(self, data: memoryview, ends: Array, width: int) -> None:
        """The documents between ends (n,) of one chunk."""
        lengths = np.diff(ends)
        real = lengths > 1
        self.counts.documents += int(np.count_nonzero(real))
        for length, number in zip(*np.unique(lengths[real], return_counts=True), strict=True):
            self.counts.lengths[int(length)] += int(number)
        room = MOST_HASHES - self.counts.hashed
        pairs = zip((ends[:-1][real][:room] + 1).tolist(), ends[1:][real][:room].tolist(), strict=True)
        digest = xxhash.xxh3_64_intdigest
        self._hashed(np.array([digest(data[start * width : end * width]) for start, end in pairs], np.uint64))

    def _hashed(self, hashes: Array) -> None:
        hashes = hashes[: MOST_HASHES - self.counts.hashed]
        self.counts.hashed += len(hashes)
        self.hashes.append(hashes)

    def end(self) -> None:
        """A run is over."""
        self.counts.cut += self.length > 0

    def finish(self) -> Counts:
        """What was counted, duplicates among it."""
        if self.counts.hashed:
            copies = np.unique(np.concatenate(self.hashes), return_counts=True)[1]
            self.counts.duplicates = self.counts.hashed - len(copies)
            self.counts.most_copies = int(copies.max())
        return self.counts


def bins(lengths: Counter[int]) -> Iterator[tuple[int, int, int]]:
    """Documents by length in bins that double: (least, most, documents), without those before the first and behind the last
    that hold any."""
    found = Counter[int]()
    for length, number in lengths.items():
        found[length.bit_length() - 1] += number
    for power in range(min(found, default=0), max(found, default=-1) + 1):
        yield 1 << power, (2 << power) - 1, found[power]


def quantile(lengths: Counter[int], share: float) -> int:
    """The length that this share of the documents is at most as long as."""
    seen, wanted = 0, share * lengths.total()
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length
    return 0
