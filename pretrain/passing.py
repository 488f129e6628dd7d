"""Chunks of training data that could not be had and are passed over, where `data.remote.on_missing` says so.

The rank that cannot have one fills its samples with document ends, which count nothing, and all ranks learn of it with the
counts of a step (its reader may be some steps ahead). From then on none reads it, nor does a run that goes on from a later
checkpoint, wherever the chunk may be by then.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from parallel.grid import Grid
from pretrain.data.sources import Sources
from pretrain.opening import State
from pretrain.report import Silent


class Passing:
    """What the ranks know of such chunks."""

    def __init__(self, sources: Sources, grid: Grid) -> None:
        self.sources, self.grid = sources, grid

    def counts(self, state: State, tokens: np.ndarray) -> tuple[int, int]:
        """Of a step on this rank: samples in such chunks, and chunks that the run does not know of yet. tokens (B, T)."""
        known = self.sources.passed
        if not known:
            return 0, 0
        empty = (tokens == self.sources.tokenizer.eos).all(axis=1)
        return int(empty.sum()) * self.grid.reads_data, len(known.keys() - set(state.passed))

    def settle(self, state: State, samples: int, reporter: Silent) -> State:
        """Tell all ranks of all such chunks. samples: in them, of all ranks in the step that begins. Collective."""
        reasons = {chunk: why for part in self.grid.from_all(self.sources.passed) for chunk, why in part.items() if why}
        new = sorted(reasons.keys() - set(state.passed))
        self.sources.pass_over(new)
        for source, chunk in new:
            why = reasons[source, chunk]
            facts = {"event": "pass", "source": source, "chunk": chunk, "why": why}
            reporter.left_out(state.step + 1, f"passed over: {why}", facts)
        passed = tuple(sorted({*state.passed, *new}))
        return dataclasses.replace(state, passed=passed, passed_samples=state.passed_samples + samples)
