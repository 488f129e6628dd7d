"""What an objective makes of token ids: the tensors of one micro-batch, as its model's `forward` takes them.

Of every batch the loop asks three things: `counts`, the targets of each term of the loss; `without`, the same with some
samples counting nothing; and `to`, the same on a device. The first tensor is (B, S).
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Batch(NamedTuple):
    """B sequences of S positions, each of which predicts the next."""

    inputs: Tensor  # (B, S) int64 ids
    targets: Tensor  # (B, S) int64 ids; what each position predicts
    mask: Tensor  # (B, S) float32: 1 where the target counts in the loss, else 0
    sample_keys: Tensor  # (B,) int32 from kernels.noise.sample_keys: keys the dropout masks
    documents: Tensor | None = (
        None  # (B, S) int32 numbers of the documents; a position sees its own only. None: it sees all
    )

    def counts(self) -> Tensor:
        """(1,) float64."""
        return self.mask.sum(dtype=torch.float64)[None]

    def without(self, gone: Tensor) -> Self:
        """gone (B,) bool."""
        return self._replace(mask=self.mask * ~gone[:, None])

    def to(self, device: torch.device) -> Self:
        return self._replace(**{name: held.to(device) for name, held in self._asdict().items() if held is not None})


class MaskedBatch(NamedTuple):
    """B sequences of S positions, of which up to P are predicted; `pretrain.models.bert` takes it."""

    inputs: Tensor  # (B, S) int64 ids
    targets: Tensor  # (B, P) int64 ids
    mask: Tensor  # (B, P) float32: 1 where there is a target
    sample_keys: Tensor  # (B,) int32
    documents: Tensor | None  # (B, S) int32
    segments: Tensor  # (B, S) int64: 0 in the first segment, 1 in the second
    places: Tensor  # (B, P) int64 places of the targets; 0 where there is none
    labels: Tensor | None = None  # (B,) int64: 1 where the second segment does not follow the first
    labelled: Tensor | None = None  # (B,) float32: 1 where the label counts

    def counts(self) -> Tensor:
        """(1,) or with labels (2,) float64."""
        counted = [self.mask] if self.labelled is None else [self.mask, self.labelled]
        return torch.stack([mask.sum(dtype=torch.float64) for mask in counted])

    def without(self, gone: Tensor) -> Self:
        """gone (B,) bool."""
        labelled = None if self.labelled is None else self.labelled * ~gone
        return self._replace(mask=self.mask * ~gone[:, None], labelled=labelled)

    def to(self, device: torch.device) -> Self:
        return self._replace(**{name: held.to(device) for name, held in self._asdict().items() if held is not None})


class PairBatch(NamedTuple):
    """B sources of M tokens and targets of S; `pretrain.models.transformer` takes it."""

    inputs: Tensor  # (B, M + S) int64: ids of the source, and behind them what the decoder reads
    targets: Tensor  # (B, S) int64
    mask: Tensor  # (B, S) float32: 1 where the target counts
    sample_keys: Tensor  # (B,) int32
    documents: Tensor | None = None  # (B, M + S) int32; of a target's document are source tokens and its own before it

    def counts(self) -> Tensor:
        """(1,) float64."""
        return self.mask.sum(dtype=torch.float64)[None]

    def without(self, gone: Tensor) -> Self:
        """gone (B,) bool."""
        return self._replace(mask=self.mask * ~gone[:, None])

    def to(self, device: torch.device) -> Self:
        return self._replace(**{name: held.to(device) for name, held in self._asdict().items() if held is not None})


class TaskBatch(NamedTuple):
    """N sequences of labelled examples (several of one example for multiple choice); `pretrain.models.tasks` takes it."""

    inputs: Tensor  # (N, S) int64 ids
    targets: Tensor  # (B, 1) or (B, S) or (B, 2): classes, numbers, tags, or the places of both ends
    mask: Tensor  # float32 weights of the targets: (B, 1), of tags (B, S)
    sample_keys: Tensor  # (N,) int32
    documents: Tensor  # (N, S) int32: 1 where there is no token, else 0
    segments: Tensor  # (N, S) int64
    places: Tensor  # (N, 1) int64: the position that stands for the sequence

    def counts(self) -> Tensor:
        """(1,) float64: the weights of the targets together."""
        return self.mask.sum(dtype=torch.float64)[None]

    def without(self, gone: Tensor) -> Self:
        """gone (B,) bool."""
        return self._replace(mask=self.mask * ~gone[:, None])

    def to(self, device: torch.device) -> Self:
        return self._replace(**{name: held.to(device) for name, held in self._asdict().items()})


TextBatch = Batch | MaskedBatch | PairBatch
AnyBatch = TextBatch | TaskBatch
