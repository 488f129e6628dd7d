"""Norms and histograms of logical tensors and of their gradients, the same under every layout.

A measure makes of numbers a vector that adds up: that of a whole is the sum of its parts'. So each rank measures its shares
of the optimizer's memory, and one sum over all ranks has every logical element once. A gradient is measured where the
optimizer takes it, as its step begins: summed over micro-batches, replicas and tensor ranks, in float32, before clipping.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.adamw import square_sum
from parallel.engine import Engine, Share
from parallel.gradients import counts_once
from parallel.grid import Grid
from parallel.sketch import intervals

CHUNK = 1 << 22  # elements measured at a time
# A histogram has eight edges an octave, 9% apart, between 2^-32 and 2^10 on either side of zero; one bucket is between.
OCTAVES, PARTS = range(-32, 10), 8

Measure = Callable[[Tensor], Tensor]  # flat numbers (n,) -> (k,) float64


class Histogram(NamedTuple):
    """Counts of the numbers between each edge and the next, trimmed to those that have any; numbers that are not finite
    are left out, and those beyond the last edge are in the last bucket."""

    edges: list[float]  # one more than counts
    counts: list[float]
    sum: float
    square_sum: float


def squares(values: Tensor) -> Tensor:
    """(1,): the sum of the squares."""
    return square_sum([values]).reshape(1)


def spread(values: Tensor) -> Tensor:
    """(2 + buckets,): the sum, the sum of the squares, and the counts that `histogram` reads."""
    values = values[values.isfinite()].float()
    edges = torch.tensor(_edges()[1:-1], device=values.device)
    counts = torch.bincount(torch.bucketize(values, edges), minlength=len(edges) + 1)
    return torch.cat([values.double().sum().reshape(1), squares(values), counts.double()])


def histogram(vector: Tensor) -> Histogram:
    """Of what `spread` gave, summed over any parts."""
    total, square, *counts = vector.tolist()
    used = [place for place, count in enumerate(counts) if count]
    if not used:
        return Histogram([], [], 0.0, 0.0)
    first, last = used[0], used[-1] + 1
    return Histogram(list(_edges()[first : last + 1]), counts[first:last], total, square)


@functools.cache
def _edges() -> Sequence[float]:
    """As float32 numbers, exactly."""
    above = [2.0 ** (octave + part / PARTS) for octave in OCTAVES for part in range(PARTS)] + [2.0**OCTAVES.stop]
    return torch.tensor([-edge for edge in reversed(above)] + above).tolist()


class Measured(NamedTuple):
    """Vectors by the canonical name of what learns, (k,) float64 in host memory; the same on every rank."""

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class Meter:
    """Measures the gradients of the steps that are taken within `watching`; does nothing at others."""

    def __init__(self, engine: Engine, grid: Grid, measure: Measure) -> None:
        self.engine, self.grid, self.measure = engine, grid, measure
        self.gradients: dict[str, Tensor] = {}
        self.names: list[str] = []  # of all ranks, once they are known

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.gradients = {}
        handle = self.engine.optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        try:
            yield
        finally:
            handle.remove()

    def _take_gradients(self) -> None:
        """Of what the optimizer is about to step: all, or one of DeepSpeed's groups. A share lies where its master does,
        in one of the optimizer's own tensors."""
        groups = self.engine.optimizer.param_groups
        stepped = [flat for group in groups for flat in group["params"] if flat.grad is not None]
        by_storage = {flat.untyped_storage().data_ptr(): flat for flat in stepped}
        for share in self.engine.shares():
            flat = by_storage.get(share.master.untyped_storage().data_ptr())
            if flat is not None:
                start = share.master.storage_offset() - flat.storage_offset()
                self._add(self.gradients, share, flat.grad.reshape(-1)[start : start + share.numel])

    @torch.no_grad()
    def read(self) -> Measured:
        """Of the gradients of the last step watched, and of the weights as they are now. Collective."""
        weights: dict[str, Tensor] = {}
        for share in self.engine.shares():
            if share.moments:
                self._add(weights, share, share.master)
        if not self.names:
            self.names = sorted(set().union(*self.grid.from_all([*weights])))
        zeros = torch.zeros_like(self.measure(torch.zeros(1)), device=self.grid.device)
        rows = [found.get(name, zeros).to(zeros) for found in (self.gradients, weights) for name in self.names]
        sums = self.grid.total(torch.stack(rows)).cpu().split(len(self.names))
        return Measured(*(dict(zip(self.names, part, strict=True)) for part in sums))

    @torch.no_grad()
    def _add(self, found: dict[str, Tensor], share: Share, values: Tensor) -> None:
        """What this rank alone has of a share's numbers, (share.numel,)."""
        ours = counts_once(share.parameter, self.grid.tensor.rank)
        if not ours or (share.replicated and self.grid.replica_rank):
            return
        for name, _, first, last in intervals(share):
            for part in values[first - share.start : last - share.start].split(CHUNK):
                measured = self.measure(part)
                found[name] = found[name] + measured if name in found else measured
