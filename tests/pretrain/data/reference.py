"""The order of samples once more, one number at a time in Python's own integers: what `pretrain.data.order` is held to.

Written from the words of that module's docstring and research notes, not from its arrays: slow, and short enough to be
checked by eye.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
PERIOD = 4096


def mix(x: int) -> int:
    """splitmix64's finalizer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def key(*parts: int) -> int:
    value = GOLDEN
    for part in parts:
        value = mix((value + part * 0xD1342543DE82EF95 + 1) & MASK)
    return value


def permute(x: int, size: int, keyed: int) -> int:
    """Feistel rounds on a rectangle, walked until the value is inside."""
    height = max(math.isqrt(size - 1) + 1, 1)
    width = -(-size // height)
    while True:
        left, right = divmod(x, width)
        for turn in range(6):
            round_key = (keyed + turn * GOLDEN) & MASK
            if turn % 2 == 0:
                left = (left + mix((right + round_key) & MASK)) % height
            else:
                right = (right + mix((left + round_key) & MASK)) % width
        x = left * width + right
        if x < size:
            return x


class Reference:
    """`Order.locate` for one number. sources: (samples, samples a chunk)."""

    def __init__(
        self, sources: Sequence[tuple[int, int]], seed: int, weights: Sequence[float], lanes: int, window: int
    ) -> None:
        self.sources, self.seed, self.lanes, self.window = list(sources), seed, lanes, window
        self.visits = shares(weights)
        self.slots = round_robin(tuple(self.visits))

    def locate(self, number: int) -> tuple[int, int]:
        lane, turn = number % self.lanes, number // self.lanes
        if len(self.sources) == 1:
            epoch, place = divmod(number, self.sources[0][0])
            return 0, self.inside(0, epoch, place % self.lanes, place // self.lanes)
        start = key(self.seed, lane) % PERIOD
        source = self.slots[(start + turn) % PERIOD]
        periods, rest = divmod(turn, PERIOD)
        seen = [self.slots[(start + past) % PERIOD] for past in range(rest)]
        visit = periods * self.visits[source] + seen.count(source)
        return source, self.visited(source, lane, visit)

    def visited(self, source: int, lane: int, visit: int) -> int:
        """The sample of a lane's visit."""
        samples = self.sources[source][0]
        if samples < self.lanes:  # lanes l, l + N, ... share a place and take different epochs in turn
            sharing = -(-self.lanes // samples)
            return self.inside(source, visit * sharing + lane // samples, lane % samples, 0)
        length = len(range(lane, samples, self.lanes))
        return self.inside(source, visit // length, lane, visit % length)

    def inside(self, index: int, epoch: int, lane: int, m: int) -> int:
        """A lane's m-th sample of an epoch: walk its windows of chunks, then the tail."""
        samples, per_chunk = self.sources[index]
        full, keyed = samples // per_chunk, key(self.seed, 1, index, epoch)
        body = full // (self.lanes * self.window) * self.window  # chunks of each lane that lie in windows
        first, number = 0, 0
        late = lane * self.window // self.lanes
        while first < body:
            last = min(self.window * (number + 1) - late, body)
            if m < last * per_chunk:
                size = (last - first) * per_chunk
                place = permute(m - first * per_chunk, size, key(keyed, lane, number))
                slot = lane + self.lanes * (first + place // per_chunk)
                return permute(slot, full, keyed) * per_chunk + place % per_chunk
            first, number = last, number + 1
        taken = body * self.lanes
        tail = samples - taken * per_chunk
        place = permute((m - body * per_chunk) * self.lanes + lane, tail, key(keyed, 7))
        chunk, inside = divmod(place, per_chunk)
        if taken + chunk < full:
            return permute(taken + chunk, full, keyed) * per_chunk + inside
        return full * per_chunk + place - (full - taken) * per_chunk


class Counting(Reference):
    """A mixture whose shares change, walked from sample number 0 on with a counter a lane and source: nothing is calculated that
    can be counted. stretches: first sample number of each, and the slots of each source."""

    def __init__(
        self,
        sources: Sequence[tuple[int, int]],
        seed: int,
        stretches: Sequence[tuple[int, Sequence[int]]],
        lanes: int,
        window: int,
    ) -> None:
        super().__init__(sources, seed, [1] * len(sources), lanes, window)
        self.stretches = stretches
        self.counts = [[0] * len(sources) for _ in range(lanes)]

    def walk(self, numbers: int) -> Iterator[tuple[int, int]]:
        """(source, sample) of each sample number below `numbers`."""
        tables = [round_robin(tuple(slots)) for _, slots in self.stretches]
        stretch, taken = 0, [0] * self.lanes  # turns of each lane since the stretch began
        for number in range(numbers):
            while stretch + 1 < len(self.stretches) and number >= self.stretches[stretch + 1][0]:
                stretch, taken = stretch + 1, [0] * self.lanes
            lane = number % self.lanes
            start = (key(self.seed, lane, stretch) if stretch else key(self.seed, lane)) % PERIOD
            source = tables[stretch][(start + taken[lane]) % PERIOD]
            yield source, self.visited(source, lane, self.counts[lane][source])
            taken[lane] += 1
            self.counts[lane][source] += 1


def shares(weights: Sequence[float]) -> list[int]:
    """Slots of each source in a period: largest remainder, the first of equals."""
    total = sum(map(Fraction, weights))
    exact = [Fraction(weight) / total * PERIOD for weight in weights]
    slots = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (slots[index] - exact[index], index))
    for index in by_remainder[: PERIOD - sum(slots)]:
        slots[index] += 1
    return slots


@functools.cache
def round_robin(visits: tuple[int, ...]) -> list[int]:
    """Smooth weighted round robin: at each slot all gain their weight, the richest is taken and pays the period."""
    credit, slots = [0] * len(visits), []
    for _ in range(PERIOD):
        credit = [have + gain for have, gain in zip(credit, visits, strict=True)]
        chosen = credit.index(max(credit))
        credit[chosen] -= PERIOD
        slots.append(chosen)
    return slots
