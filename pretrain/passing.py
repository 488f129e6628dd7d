"""Chunks of training data that could not be had and are passed over, where `data.remote.on_missing` says so.

The rank that cannot have one fills its samples with document ends, which count nothing, and all ranks learn of it with the
counts of the first step that has some of these. From then on none reads it, nor does a run that goes on from a later
checkpoint, wherever the chunk may be by then.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from parallel.grid import Grid
from pretrain.data.sources import Sources
from pretrain.data.stream import Passed, Stream
from pretrain.finetuning.examples import ExampleStream
from pretrain.opening import State
from pretrain.report import Silent

Array = np.ndarray[Any, Any]
AnyStream = Stream | ExampleStream


class Passing:
    """What the ranks know of such chunks."""

    def __init__(self, sources: Sources, grid: Grid) -> None:
        self.sources, self.grid = sources, grid
        self._met: dict[Passed, str] = {}  # of this step, which the run does not know of yet, and why

    def counts(self, stream: AnyStream, state: State, numbers: Array, tokens: Array) -> tuple[int, int]:
        """Of a step on this rank: its samples in such chunks, and the chunks of these that the run does not know of yet (a
        reader that is ahead may know of more). numbers (B,), tokens (B, T)."""
        self._met = {}
        if isinstance(stream, ExampleStream) or not stream.passed:
            return 0, 0
        empty = numbers[(tokens == stream.eos).all(axis=1)]
        chunks = set(stream.chunks_of(empty)) - set(state.passed)
        self._met = {chunk: stream.passed[chunk] for chunk in chunks if chunk in stream.passed}
        return len(empty) * self.grid.reads_data, len(self._met)

    def settle(self, state: State, samples: int, reporter: Silent) -> State:
        """Tell all ranks of all such chunks. samples: in them, of all ranks in the step that begins. Collective."""
        met = {chunk: why for part in self.grid.from_all(self._met) for chunk, why in part.items()}
        self.sources.pass_over(met)
        for source, chunk in sorted(met):
            facts = {"event": "pass", "source": source, "chunk": chunk, "why": met[source, chunk]}
            reporter.left_out(state.step + 1, f"passed over: {met[source, chunk]}", facts)
        passed = tuple(sorted({*state.passed, *met}))
        return dataclasses.replace(state, passed=passed, passed_samples=state.passed_samples + samples)
