"""Labelled examples: planes of ids, segments and targets (`pretrain.finetuning.examples`) as a task's model takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import noise
from pretrain.objectives.batch import Batch, TaskBatch

IGNORED = -100  # pretrain.tasks.alignment
LabelledBatch = TaskBatch | Batch


class Labelled:
    """Makes a micro-batch of samples of one or several rows each.

    class_weights (C,): of each class's targets, None: 1. at_end: the sequence's last token stands for it, not its first.
    Instructions become sequences whose targets are the next ids, as text does. Their padding is at the end, where a causal
    model's other positions do not see it.
    """

    terms = ("loss",)
    also = None

    def __init__(self, kind: str, seed: int, num_rows: int, class_weights: Tensor | None, at_end: bool) -> None:
        self.kind, self.seed, self.num_rows, self.at_end = kind, seed, num_rows, at_end
        self.class_weights = class_weights

    def __call__(self, numbers: Tensor, tokens: Tensor) -> LabelledBatch:
        """numbers (B,) int64; tokens (B, 3 R, W) int64: planes of R rows. Rows become sequences of their own, (B R, W)."""
        width = tokens.shape[2]
        ids, segments = tokens[:, 0::3].reshape(-1, width), tokens[:, 1::3].reshape(-1, width)
        keys = noise.sample_keys(self.seed, numbers)
        if self.num_rows > 1:
            keys = noise.split_keys(keys, 0, self.num_rows)
        if self.kind == "instruction":
            return Batch(ids.clamp(min=0), *self._targets(tokens[:, 2]), keys)
        last = (ids >= 0).sum(dim=1).sub(1).clamp(min=0)
        places = last[:, None] if self.at_end else torch.zeros(len(ids), 1, dtype=torch.int64)
        targets, weights = self._targets(tokens[:, 2])
        padding = (ids < 0).to(torch.int32)
        return TaskBatch(ids.clamp(min=0), targets, weights, keys, padding, segments, places)

    def _targets(self, plane: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and their weights (float32): (B, 1), for tags and instructions (B, W), for answers (B, 2) with weights
        (B, 1)."""
        if self.kind == "regression":
            values = plane[:, :1].contiguous().view(torch.float64)
            return values.nan_to_num(0.0).float(), (~values.isnan()).float()
        shapes = {"tagging": plane, "instruction": plane, "question-answering": plane[:, :2]}
        targets = shapes.get(self.kind, plane[:, :1])
        counted = targets != IGNORED
        targets = torch.where(counted, targets, 0)
        weights = counted.float()
        if self.class_weights is not None:
            weights = weights * self.class_weights[targets]
        return targets, weights[:, :1] if self.kind == "question-answering" else weights
