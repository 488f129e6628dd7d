"""The global order of samples: sample number n -> (source, sample), from the seed and n alone.

No table, no generator state, no library's random numbers (numpy's streams may change with its version): a keyed
bijection of integers, so any position costs the same, an epoch is exactly once each sample, and the world size never
enters.

Legend: L lanes, W chunks of a window, S samples a chunk, N samples of a source, e epoch, m place in a lane's epoch.

  lanes     Sample number n is lane n mod L's (n div L)-th. A lane owns every L-th chunk of the epoch's permuted chunks,
            and a rank takes whole lanes of a batch: so up to L ranks each chunk is read by one rank only.
  windows   Inside a lane, W chunks at a time are shuffled sample by sample: L x W chunks are open at once. Lanes end
            their windows at different places (lane l's first has W - l W div L chunks), so that chunks are not all
            read at once.
  tail      What does not fill L x W chunks (and the short last chunk) is shuffled flat, at each epoch's end. A small
            corpus is all tail: a full shuffle.
  mixture   Several sources: each lane walks a smooth weighted round robin over a period of 4096 slots, beginning at a
            place of its own; a lane's k-th visit of a source is its (k mod length)-th sample of epoch k div length. So
            shares are exact to 1/4096 and every sample of a source is visited once before any twice, lane by lane.
            Shares may change at any sample number; each source then goes on where the lane stands in it
            (`pretrain.data.shares`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.shares import PERIOD, Stretch, Turns, slots_of

U64 = np.uint64
Integers = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

VERSION = 1  # of the order itself: part of a stream's recipe, so that a changed order cannot resume an older run
ROUNDS = 6
GOLDEN = U64(0x9E3779B97F4A7C15)


class Source(NamedTuple):
    """Sizes of one source: its samples, and samples in each chunk but the last."""

    samples: int
    per_chunk: int


def mix(x: Any) -> Words:
    """splitmix64's finalizer (Steele, Lea and Flood 2014), elementwise: a bijection of 64 bits."""
    x = np.array(x, U64)
    with np.errstate(over="ignore"):
        x ^= x >> U64(30)
        x *= U64(0xBF58476D1CE4E5B9)
        x ^= x >> U64(27)
        x *= U64(0x94D049BB133111EB)
        x ^= x >> U64(31)
    return x


def key(*parts: Any) -> Words:
    """A 64-bit key of several integers or arrays of them, elementwise."""
    value = np.asarray(GOLDEN)
    with np.errstate(over="ignore"):
        for part in parts:
            value = mix(value + np.asarray(part).astype(U64) * U64(0xD1342543DE82EF95) + U64(1))
    return value


def permute(x: Any, size: Any, keys: Any) -> Integers:
    """Keyed bijection of 0 .. size - 1, elementwise over x, size and keys (broadcast together).

    A Feistel network of 6 rounds on pairs (left, right) of a rectangle that just holds `size`; a value that falls
    outside is sent through again until it is inside (cycle walking: Black and Rogaway 2002), fewer than 2 times on
    average.
    """
    x, size, keys = np.broadcast_arrays(np.asarray(x, U64), np.asarray(size, U64), np.asarray(keys, U64))
    shape, out = x.shape, x.ravel().copy()
    size, keys = size.ravel(), keys.ravel()
    height = np.maximum(np.ceil(np.sqrt(size.astype(np.float64))), 1).astype(U64)
    width = (size + height - U64(1)) // height
    todo = np.arange(out.size)
    while todo.size:
        value = _feistel(out[todo], height[todo], width[todo], keys[todo])
        out[todo] = value
        todo = todo[value >= size[todo]]
    return out.reshape(shape).astype(np.int64)


def _feistel(x: Words, height: Words, width: Words, keys: Words) -> Words:
    left, right = x // width, x % width
    with np.errstate(over="ignore"):
        for turn in range(ROUNDS):
            round_key = keys + U64(turn) * GOLDEN
            if turn % 2 == 0:
                left = (left + mix(right + round_key) % height) % height
            else:
                right = (right + mix(left + round_key) % width) % width
    return left * width + right


class Order:
    """Order of one source, or of a mixture: with `weights` (default: by their numbers of samples), or with shares that change,
    `stretches`, of which the first begins with the order. first: sample number that stands at the order's beginning."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        weights: Sequence[float] | None = None,
        lanes: int = 256,
        window: int = 16,
        first: int = 0,
        stretches: Sequence[Stretch] | None = None,
    ) -> None:
        if not sources or any(source.samples < 1 or source.per_chunk < 1 for source in sources):
            raise ValueError("an order needs at least one source, each with at least one sample")
        if lanes < 1 or window < 1:
            raise ValueError(f"lanes and window must be at least 1, not {lanes} and {window}")
        self.sources, self.lanes, self.window = list(sources), lanes, window
        self.seed, self.first = seed % 2**64, first
        self.weights = None
        if stretches is None:
            self.weights = list(weights) if weights is not None else [float(source.samples) for source in sources]
            stretches = [self._whole_run(self.weights)]
            self._one_source = len(sources) == 1
        else:
            self._one_source = False
        self._turns = Turns(stretches, self._starts(len(stretches)))

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all sources together; with one source an epoch is exactly so many numbers."""
        return sum(source.samples for source in self.sources)

    def _whole_run(self, weights: Sequence[float]) -> Stretch:
        """Shares that never change."""
        if len(weights) != len(self.sources) or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError("weights must be one positive number for each source")
        slots = slots_of(weights)
        if not all(slots):
            raise ValueError(f"the smallest weight is below 1/{PERIOD} of the sum")
        return Stretch(0, slots, np.zeros((self.lanes, len(weights)), np.int64))

    def _starts(self, stretches: int) -> Integers:
        """(P, L): the slot at which each lane begins in each stretch."""
        lanes = np.arange(self.lanes)
        later = [key(self.seed, lanes, number) for number in range(1, stretches)]
        return (np.stack([key(self.seed, lanes), *later]) % U64(PERIOD)).astype(np.int64)

    def locate(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Source and sample of each sample number. numbers (B,) int64, at least `first`; returns two (B,) int64 arrays."""
        numbers = self._from_first(numbers)
        if self._one_source:
            epoch, place = np.divmod(numbers, self.sources[0].samples)
            inside = self._inside(0, epoch, place % self.lanes, place // self.lanes)
            return np.zeros_like(numbers), inside
        source, visit = self._turns.visit(numbers)
        samples = np.empty_like(numbers)
        for index in range(len(self.sources)):
            chosen = np.flatnonzero(source == index)
            samples[chosen] = self._inside(index, *self._visited(index, numbers[chosen] % self.lanes, visit[chosen]))
        return source, samples

    def epoch(self, number: int) -> int:
        """Which pass over its source a sample number belongs to."""
        at = self._from_first(np.array([number]))
        if self._one_source:
            return int(at[0]) // self.sources[0].samples
        source, visit = self._turns.visit(at)
        return int(self._visited(int(source[0]), at % self.lanes, visit)[0][0])

    def visits(self, number: int) -> Integers:
        """(L, K) int64: how often each lane has visited each source of a mixture before a sample number."""
        return self._turns.visits(number - self.first)

    def _from_first(self, numbers: Integers) -> Integers:
        numbers = np.asarray(numbers, np.int64) - self.first
        if numbers.size and numbers.min() < 0:
            raise ValueError(f"sample numbers begin at {self.first}")
        return numbers

    def _visited(self, index: int, lane: Integers, visit: Integers) -> tuple[Integers, Integers, Integers]:
        """Of a lane's visit to a source: the epoch, the lane whose sample it takes, and which of that lane's. Of a source with
        fewer samples than lanes, lanes l, l + N, ... share a place and take different epochs in turn."""
        samples = self.sources[index].samples
        sharing = -(-self.lanes // samples) if samples < self.lanes else 1
        place = lane % samples if sharing > 1 else lane
        length = (samples - place + self.lanes - 1) // self.lanes
        epoch = visit // length * sharing + (lane // samples if sharing > 1 else 0)
        return epoch, place, visit % length

    def _inside(self, index: int, epoch: Integers, lane: Integers, m: Integers) -> Integers:
        """The m-th sample of a lane in a source's epoch: of a window, or of the tail."""
        source = self.sources[index]
        full = source.samples // source.per_chunk
        body_chunks = full // (self.lanes * self.window) * self.window  # of each lane
        keys = np.broadcast_to(key(self.seed, 1, index, epoch), m.shape)
        samples = np.empty(m.shape, np.int64)
        body = m < body_chunks * source.per_chunk
        if body.any():
            samples[body] = self._in_window(source, body_chunks, keys[body], lane[body], m[body])
        if not body.all():
            flat = (m[~body] - body_chunks * source.per_chunk) * self.lanes + lane[~body]
            samples[~body] = self._in_tail(source, body_chunks * self.lanes, keys[~body], flat)
        return samples

    def _in_window(self, source: Source, body: int, keys: Words, lane: Integers, m: Integers) -> Integers:
        """Windows of W chunks, but a lane's first is shorter by `late` and so is there one of `late` at its end."""
        late = lane * self.window // self.lanes
        number = (m // source.per_chunk + late) // self.window
        first = np.maximum(number * self.window - late, 0)
        last = np.minimum((number + 1) * self.window - late, body)
        size, place = (last - first) * source.per_chunk, m - first * source.per_chunk
        place = permute(place, size, key(keys, lane, number))
        slot = lane + self.lanes * (first + place // source.per_chunk)
        return permute(slot, source.samples // source.per_chunk, keys) * source.per_chunk + place % source.per_chunk

    def _in_tail(self, source: Source, first: int, keys: Words, flat: Integers) -> Integers:
        """Samples of the permuted chunks from `first` on and of the short last chunk, all shuffled together."""
        full = source.samples // source.per_chunk
        place = permute(flat, source.samples - first * source.per_chunk, key(keys, 7))
        whole = (full - first) * source.per_chunk  # samples of the tail that lie in whole chunks
        slot = first + np.minimum(place, max(whole - 1, 0)) // source.per_chunk
        chunk = permute(np.minimum(slot, max(full - 1, 0)), max(full, 1), keys)
        return np.where(
            place < whole,
            chunk * source.per_chunk + place % source.per_chunk,
            full * source.per_chunk + place - whole,
        )


class Sequential:
    """The order of validation: every sample of every source once an epoch, as they lie."""

    lanes = 1

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._ends = np.cumsum([source.samples for source in sources], dtype=np.int64)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all sources together."""
        return int(self._ends[-1])

    def locate(self, numbers: Integers) -> tuple[Integers, Integers]:
        """As `Order.locate`."""
        place = np.asarray(numbers, np.int64) % self.samples_per_epoch
        source = np.searchsorted(self._ends, place, side="right")
        return source, place - np.concatenate([[0], self._ends])[source]

    def epoch(self, number: int) -> int:
        """As `Order.epoch`."""
        return number // self.samples_per_epoch


def rank_numbers(first: int, size: int, rank: int, world: int, lanes: int) -> Integers:
    """Sample numbers that a rank takes of the global batch first .. first + size - 1: (size / world,) int64.

    The batch sorted by (lane, n) is cut into equal slices. Raises ValueError if it cannot be.
    """
    if not 0 <= rank < world or size < 1 or size % world:
        raise ValueError(f"a batch of {size} sequences cannot be shared by {world} data-parallel ranks (rank {rank})")
    numbers = np.arange(first, first + size, dtype=np.int64)
    share = size // world
    return numbers[np.argsort(numbers % lanes, kind="stable")][rank * share : (rank + 1) * share]
