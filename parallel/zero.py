"""Which engine a layout needs: `PlainEngine` where every replica holds all of the optimizer, `DeepSpeedEngine` where they
share it (ZeRO stages 1 to 3). Both present the optimizer as flat `Share`s, so that initial weights, checkpoints and exports
need not know which one runs.
"""

from __future__ import annotations

from torch import nn

from parallel.engine import AdamWOptions, Engine
from parallel.grid import Grid
from parallel.replicated import PlainEngine
from parallel.sharded import DeepSpeedEngine
from parallel.stages import Stage


def make_engine(stages: list[Stage], grid: Grid, options: AdamWOptions, tied: nn.Parameter | None) -> Engine:
    """stages: this rank's, their parameters in the compute dtype. tied: its end of an embedding that is also at the
    other end of the pipeline, else None."""
    if tied is not None and not grid.first_stage:
        tied.ds_pipe_replicated = True  # type: ignore[attr-defined]  # norms and checkpoints take the first stage's alone
    alone = grid.replica_size == 1 and not grid.layout.offload  # nobody to share with, whatever the stage
    if grid.layout.zero == 0 or alone:
        return PlainEngine(stages, grid, options, tied)
    return DeepSpeedEngine(stages, grid, options, tied)
