"""What an objective makes of token ids: the tensors of one micro-batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """B sequences of S positions."""

    inputs: Tensor  # (B, S) int64 ids
    targets: Tensor  # (B, S) int64 ids; what each position predicts
    mask: Tensor  # (B, S) float32: 1 where the target counts in the loss, else 0
    sample_keys: Tensor  # (B,) int32 from kernels.noise.sample_keys: keys the dropout masks
    documents: Tensor | None = (
        None  # (B, S) int32 numbers of the documents; a position sees its own only. None: it sees all
    )

    def to(self, device: torch.device) -> Batch:
        return self._replace(**{name: held.to(device) for name, held in self._asdict().items() if held is not None})
