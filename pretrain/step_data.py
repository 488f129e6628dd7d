"""What a rank has of one step before it computes: its samples as micro-batches, and what all ranks told with their counts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pretrain.objectives.batch import AnyBatch


class StepData(NamedTuple):
    """This rank's part of one step."""

    numbers: np.ndarray  # sample numbers (n,)
    tokens: np.ndarray  # (n, S + 1), with those of further samples behind them (n, 2 (S + 1))
    batches: list[AnyBatch]  # the same as micro-batches
    size: int  # sequences of the step over all ranks
    filler: int  # of their tokens, over all ranks, what only fills rows
    targets: list[float]  # targets of each term of the loss that count, over all ranks
    stop: bool  # some rank was asked to stop
    save: bool  # what could not be saved before may have room now
    waited: float  # seconds for the data
