"""What a run does about spikes of its loss, and steps in a row without a finite gradient: `run.on_spike`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from parallel.grid import Grid
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, State
from pretrain.config.run import Config
from pretrain.spikes import Level, passing


class Policy:
    """All that it goes by is the config, the state and the loss, so it is the same on every rank and after a resume."""

    def __init__(self, config: Config) -> None:
        self.run = config.run
        self.count = 0  # spikes whose step was left out, since `left_out` was asked

    @property
    def is_off(self) -> bool:
        return self.run.on_spike == "ignore"

    def judge(self, state: State, loss: float) -> tuple[State, str | None]:
        """The state with this loss in its level; of a spike also what it is, in words."""
        level = Level(state.losses, state.loss_mean, state.loss_distance)
        count, mean, distance = level.after(loss, self.run.spike_factor)
        judged = dataclasses.replace(state, losses=count, loss_mean=mean, loss_distance=distance)
        if not level.is_spike(loss, self.run.spike_factor):
            return judged, None
        self.count += 1
        return judged, f"the loss is {loss:.4f}, recent ones {level}"

    def left_out(self) -> int:
        """Steps that were left out for their loss since the last call."""
        count, self.count = self.count, 0
        return count

    def rewinds(self, state: State) -> bool:
        """Whether the run may still go back."""
        return self.run.on_spike == "rewind" and state.rewinds < self.run.max_rewinds

    def checkpoint(self, state: State, folder: Path, warn: Callable[[str], None], grid: Grid) -> Checkpoint | None:
        """The newest good one to go back to. Collective."""
        return checkpoint.latest(folder, warn, grid, lambda found: found.bad_steps == 0 and found.step < state.step)

    def sent_back(self, to: State, at: State) -> State:
        """Of a run that goes back from one state to another, past the samples that it had taken since."""
        skipped = passing(to.skipped, to.samples, at.samples)
        gone = dataclasses.replace(to, passed=at.passed, passed_samples=at.passed_samples)
        return dataclasses.replace(gone, samples=at.samples, skipped=skipped, rewinds=at.rewinds + 1)
