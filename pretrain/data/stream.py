"""Sequences of tokens by sample number: the whole state of reading is how many samples were consumed.

A global batch is the sample numbers n0 .. n0 + B - 1. Sorted by lane, each rank takes its equal slice, so what a batch
holds never depends on the number of ranks, and a rank keeps to its own chunks. A source's chunk of C tokens gives C / T
sequences of T tokens, each with its last target.

A run of several phases has a stream for each over the same folders. The one of a later phase goes on in the epoch where the
tokens of those before it end, so that a run of less than an epoch reads on in chunks that it has not read (but for those that
it was in the middle of, and for the order's tail, which each length shuffles by itself).
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from pretrain.data.manifest import Manifest, canonical
from pretrain.data.order import PERIOD, VERSION, Order, Sequential, Source, rank_numbers
from pretrain.data.prefetch import Prefetch, prefetch
from pretrain.data.remote.access import RemoteFolder
from pretrain.data.remote.chunks import RemoteChunks, cache_shortage, open_chunks
from pretrain.data.remote.fetching import Missing
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.mixture import Mixture

__all__ = ["Prefetch", "Stream", "batch_hash", "prefetch", "rank_numbers"]

Integers = np.ndarray[Any, np.dtype[np.int64]]
Passed = tuple[int, int]  # a source's number, and a chunk of it
Also = Callable[[Integers], Integers]


class Stream:
    """Samples of one or more folders of shards, or of their manifests that were loaded.

    seq_length: T, the tokens of a sequence (one more is read: the last target). seed, lanes, window: of the order, see
    `pretrain.data.order`. shuffle=False: samples in the order in which they lie. weights: of several folders (default:
    by their sizes). begin, tokens: the first sample number that is the stream's, and the run's tokens before it. mixture: of
    these folders by name, whose order in a phase of sequence lengths it is. passes: a chunk that cannot be had is passed
    over, its samples filled with document ends, which count nothing (`pretrain.objectives.filler`). Raises UserError for
    whatever is wrong with the folders, before a token is read.
    """

    def __init__(
        self,
        folders: Sequence[str | Path | RemoteFolder | Manifest],
        seq_length: int,
        seed: int,
        lanes: int = 256,
        window: int = 16,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        begin: int = 0,
        tokens: int = 0,
        mixture: Mixture | None = None,
        phase: int = 0,
        passes: bool = False,
    ) -> None:
        if not folders:
            raise UserError("There is no folder of shards to read.")
        self.manifests = [part if isinstance(part, Manifest) else Manifest.load(part) for part in folders]
        _check_same_tokenizer(self.manifests)
        self.seq_length, self.lanes, self.window, self.shuffle = seq_length, lanes, window, shuffle
        sources = [source_of(manifest, seq_length) for manifest in self.manifests]
        self.names = None if mixture is None else mixture.names
        self.begin, self.first = begin, begin - -(-tokens // seq_length)  # `first` stands where the order begins
        try:
            if mixture is not None:
                self.order: Order | Sequential = mixture.course().orders[phase]
            elif shuffle:
                self.order = Order(sources, seed, weights, lanes, window, self.first)
            else:
                self.order = Sequential(sources)
        except ValueError as error:
            raise UserError(f"The data's order cannot be made: {error}.") from error
        self.recipe = {
            "order": VERSION,
            "period": PERIOD,
            "manifests": [manifest.fingerprint for manifest in self.manifests],
            "weights": getattr(self.order, "weights", None),
            "seq_length": seq_length,
            "seed": seed,
            "lanes": lanes,
            "window": window,
            "shuffle": shuffle,
            **({"begin": begin, "first": self.first} if begin else {}),  # of a later phase
            **({} if mixture is None else {"mixture": mixture.recipe}),
        }
        self._chunks, self._ahead = open_chunks(self.manifests)
        self.passes = passes
        self.passed: dict[Passed, str] = {}  # what is passed over, and why, in words
        self._per_chunk = np.array([source.per_chunk for source in sources], np.int64)
        self._lock = threading.Lock()
        self.row = 0  # of those that `gather` reads, the one that it is at: who waits for it may ask

    def ordered(self, order: Order) -> Stream:
        """The same data, and files that are open, in another order."""
        other = copy.copy(self)
        other.order = order
        return other

    @property
    def samples_per_epoch(self) -> int:
        """Sequences of all folders together."""
        return self.order.samples_per_epoch

    @property
    def vocab_size(self) -> int:
        return self.manifests[0].vocab_size

    @property
    def eos(self) -> int:
        """The id that ends a document."""
        return self.manifests[0].eos

    @property
    def findings(self) -> list[str]:
        """What is worth a warning, in sentences."""
        return cache_shortage(self._chunks, self.lanes * self.window) if self.shuffle else []

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe: everything that decides which tokens a sample number has."""
        return hashlib.sha256(canonical(self.recipe)).hexdigest()

    def read(self, numbers: Integers, also: Also | None = None) -> Integers:
        """Tokens of sample numbers (B,): (B, seq_length + 1) int64; where `also` names further samples for them, theirs
        behind them, (B, 2 (seq_length + 1)). Raises UserError naming a bad shard and chunk."""
        sources, samples = self.order.locate(numbers)
        self.expect(sources, samples)
        tokens = self.gather(sources, samples, numbers)
        return tokens if also is None else np.hstack([tokens, self.read(also(numbers))])

    def expect(self, sources: Integers, samples: Integers) -> None:
        """Samples (B,) as `order.locate` gives them that will be read behind those of the last call: what of them is
        elsewhere is fetched meanwhile."""
        if self._ahead is None:
            return
        chunks, _ = self._place(sources, samples)
        wanted = dict.fromkeys(zip(sources.tolist(), chunks.tolist(), strict=True))  # in the order of first use
        self._ahead.expect(
            (holder, chunk)
            for source, chunk in wanted
            if isinstance(holder := self._chunks[source], RemoteChunks)
            and (source, chunk) not in self.passed
            and not holder.is_at_hand(chunk)
        )

    def gather(self, sources: Integers, samples: Integers, numbers: Integers | None = None) -> Integers:
        """Tokens of samples (B,) as `order.locate` gives them for `numbers`: (B, seq_length + 1) int64. Raises as `read`
        does, with the sample's number where numbers are given."""
        rows = np.empty((len(samples), self.seq_length + 1), self.manifests[0].dtype)  # of all, by their one tokenizer
        chunks, firsts = self._place(sources, samples)
        with self._lock:
            places = zip(sources.tolist(), chunks.tolist(), firsts.tolist(), strict=True)
            for row, (source, chunk, first) in enumerate(places):
                self.row = row  # to be looked at; another thread that begins to read may set it as well
                try:
                    rows[row] = self._tokens(source, chunk, first)
                except UserError as error:
                    if numbers is None:
                        raise
                    raise UserError(f"{error} (Sample number {numbers[row]} is the first to need it.)") from error
        return rows.astype(np.int64)  # at once: row by row it costs a third of the reading

    def chunks_of(self, numbers: Integers) -> list[Passed]:
        """Where sample numbers (B,) lie."""
        sources, samples = self.order.locate(numbers)
        return list(zip(sources.tolist(), self._place(sources, samples)[0].tolist(), strict=True))

    def _tokens(self, source: int, chunk: int, first: int) -> Integers | int:
        """Of one sample; or the document end that stands in the place of each."""
        if (source, chunk) in self.passed:
            return self.eos
        try:
            return self._chunks[source].tokens(chunk, first, self.seq_length + 1)
        except Missing as error:
            if not self.passes:
                raise
            self.passed[source, chunk] = str(error)
            return self.eos

    def unpadded(self, tokens: Integers) -> Integers:
        """Of tokens that were read, what is the samples' own: all."""
        return tokens

    def _place(self, sources: Integers, samples: Integers) -> tuple[Integers, Integers]:
        """(chunk, first token in it) of samples, each (B,)."""
        chunks, indices = np.divmod(samples, self._per_chunk[sources])
        return chunks, indices * self.seq_length

    def where(self, source: int, sample: int) -> str:
        """The shard and chunk of a sample, as `order.locate` gives it, for people."""
        chunk = int(sample // self._per_chunk[source])
        return f"{self.manifests[source].folder / self._chunks[source].shard_of(chunk).name}, chunk {chunk}"

    def explain(self, number: int) -> dict[str, Any]:
        """Where a sample number's tokens are from, and its text by document."""
        sources, samples = self.order.locate(np.array([number], np.int64))
        source, sample, chunk, first = (int(part[0]) for part in (sources, samples, *self._place(sources, samples)))
        tokens = self.gather(sources, samples)[0, :-1]
        tokenizer = self.manifests[source].tokenizer()
        return {
            "number": number,
            "epoch": self.order.epoch(number),
            **({} if self.names is None else {"name": self.names[source]}),
            "source": str(self.manifests[source].folder),
            "sample": sample,
            "shard": self._chunks[source].shard_of(chunk).name,
            "chunk": chunk,
            "first_token": first,
            "documents": [tokenizer.decode(part.tolist()) for part in _split(tokens, self.eos)],
        }

    def close(self) -> None:
        """Close the open files; nothing more is fetched."""
        if self._ahead is not None:
            self._ahead.close()
        with self._lock:
            for chunks in self._chunks:
                chunks.close()


def batch_hash(numbers: Integers, tokens: Iterable[Integers]) -> int:
    """Sum, wrapping in int64, of a hash of each (sample number, its tokens).

    The sum over ranks (an int64 all-reduce) is the global batch's hash, whatever the ranks and their order. numbers
    (B,), tokens of each of them.
    """
    rows = (np.ascontiguousarray(row, "<u4") for row in tokens)
    total = sum(
        xxhash.xxh64_intdigest(row.data, seed=number % 2**64)
        for number, row in zip(numbers.tolist(), rows, strict=True)
    )
    return (total + 2**63) % 2**64 - 2**63


def source_of(manifest: Manifest, seq_length: int) -> Source:
    """Samples of a source in sequences of this length, which is refused where it does not fit, naming the nearest that do."""
    size, targets = manifest.tokens_per_chunk, manifest.tokens - 1
    if seq_length < 1:
        raise UserError(f"The sequence length must be at least 1, not {seq_length}.")
    _check_row(manifest, seq_length)
    if seq_length > targets:
        raise UserError(
            f"A sequence of {seq_length} tokens is longer than the data: {manifest.folder} has {manifest.tokens:,}."
        )
    if size % seq_length:
        raise UserError(
            f"The sequence length {seq_length} does not divide the {size:,} tokens of a chunk in {manifest.folder}. The "
            f"nearest that do are {_near_divisors(size, seq_length)}; or prepare the data again with "
            f"--tokens-per-chunk a multiple of {seq_length}."
        )
    full, rest = divmod(targets, size)
    return Source(full * (size // seq_length) + rest // seq_length, size // seq_length)


def _check_row(manifest: Manifest, seq_length: int) -> None:
    """Raises UserError where rows that were packed would be cut or joined."""
    row, kind = manifest.packing.row, manifest.packing.kind
    if row in (1, seq_length):
        return
    again = (
        ""
        if manifest.packing.is_pairs
        else f", or prepare the text again with --packing {kind} --seq-length {seq_length}"
    )
    raise UserError(
        f"{manifest.folder} holds rows of {row:,} tokens ({manifest.packing}), which are read whole, not in sequences of "
        f"{seq_length:,}: read it with a sequence length of {row}{again}."
    )


def _near_divisors(size: int, length: int) -> str:
    """The largest divisor of `size` below `length` and the smallest above, in words."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    divisors = sorted({*small, *(size // d for d in small)})
    place = bisect.bisect(divisors, length)
    return " and ".join(f"{d:,}" for d in divisors[max(place - 1, 0) : place + 1])


def _check_same_tokenizer(manifests: list[Manifest]) -> None:
    for manifest in manifests[1:]:
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256:
            raise UserError(
                f"{manifest.folder} was prepared with another tokenizer than {manifests[0].folder}: prepare one of "
                f"them again with --tokenizer {manifests[0].tokenizer_path}."
            )


def _split(tokens: Integers, eos: int) -> list[Integers]:
    """The tokens cut after each document's end, without the ends that only fill a row."""
    ends = np.flatnonzero(tokens == eos) + 1
    parts = [part for part in np.split(tokens, ends) if part.size]
    return [part for number, part in enumerate(parts) if not number or part.size > 1 or part[0] != eos]
