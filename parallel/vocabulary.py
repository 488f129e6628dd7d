"""The two ends of a language model, cut along the vocabulary (Shoeybi et al. 2019, "Megatron-LM", section 3): the embedding,
and the output matrix with its loss.

The vocabulary is padded in memory only. Shapes: B batch, S this context rank's sequence (s = S / tensor under sequence
parallelism), H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.available import Wish
from kernels.cross_entropy import linear_cross_entropy
from kernels.embedding import embedding
from parallel.axes import TensorAxis, enter, leave, mark_cut
from parallel.logical import Initial, Piece, describe

VOCABULARY_MULTIPLE = 128  # of the padded vocabulary, whatever tp is, so that every layout multiplies the same matrix


def padded_vocabulary(vocab_size: int) -> int:
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class VocabEmbedding(nn.Module):
    """ids (B, S) -> (B, s, H). Each tensor rank holds a range of the padded vocabulary and gives zero for the others' ids."""

    def __init__(self, axis: TensorAxis, vocab_size: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.axis = axis
        self.weight, self.first = _vocabulary_rows(axis, vocab_size, hidden_size, std)

    def forward(self, ids: Tensor) -> Tensor:
        if self.axis.size == 1:
            return embedding(ids, self.weight)
        local = ids - self.first
        ours = (local >= 0) & (local < self.weight.shape[0])
        x = embedding(torch.where(ours, local, 0), self.weight) * ours[..., None].to(self.weight.dtype)
        return leave(x, self.axis)


class VocabHead(nn.Module):
    """The output matrix (V, H), cut along the vocabulary, and a bias (V,). With tied embeddings pass the embedding's weight
    instead."""

    def __init__(
        self,
        axis: TensorAxis,
        hidden_size: int,
        vocab_size: int,
        std: float,
        backend: Wish = "auto",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.axis, self.vocab_size, self.backend = axis, vocab_size, backend
        self.weight, self.first = _vocabulary_rows(axis, vocab_size, hidden_size, std)
        self.bias = _vocabulary_bias(axis, vocab_size) if bias else None

    def tie(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def forward(
        self,
        x: Tensor,
        targets: Tensor,
        mask: Tensor,
        smoothing: float = 0.0,
        z_loss: float = 0.0,
        count_correct: bool = False,
    ) -> Tensor:
        """Sum over the targets of the cross-entropy, float32 scalar, the same on every tensor rank; with count_correct
        (2,): behind it how many of these targets have the highest logit, without gradient.

        x (B, s, H); targets (B, S) ids; mask (B, S), 1.0 where the target counts; smoothing and z_loss as in
        `kernels.cross_entropy.linear_cross_entropy`.
        """
        x = enter(x, self.axis)
        group = self.axis.group if self.axis.size > 1 else None
        loss = linear_cross_entropy(
            x,
            self.weight,
            targets,
            mask,
            vocab_size=self.vocab_size,
            bias=self.bias,
            first_class=self.first,
            group=group,
            smoothing=smoothing,
            z_loss=z_loss,
            backend=self.backend,
        )
        return torch.stack((loss, self._correct(x, targets, mask))) if count_correct else loss

    @torch.no_grad()
    def _correct(self, x: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        """Of several logits that are as high the lowest id counts as the highest."""
        logits = F.linear(x, self.weight, self.bias).float()
        real = max(0, min(logits.shape[-1], self.vocab_size - self.first))
        columns = torch.arange(logits.shape[-1], device=x.device)
        highest, index = torch.where(columns < real, logits, -torch.inf).max(dim=-1)
        best = torch.where(highest > -torch.inf, index + self.first, self.vocab_size)
        if self.axis.size > 1:
            over = highest.clone()
            torch.distributed.all_reduce(over, op=torch.distributed.ReduceOp.MAX, group=self.axis.group)
            best = torch.where(highest == over, best, self.vocab_size)
            torch.distributed.all_reduce(best, op=torch.distributed.ReduceOp.MIN, group=self.axis.group)
        return ((best == targets).float() * mask).sum()

    def logits(self, x: Tensor) -> Tensor:
        """(B, S, V) float32, whole, without the padding; for generation and evaluation, no gradient."""
        y = F.linear(enter(x, self.axis), self.weight, self.bias).float()
        if self.axis.size > 1:
            shares = [torch.empty_like(y) for _ in range(self.axis.size)]
            torch.distributed.all_gather(shares, y.contiguous(), group=self.axis.group)
            y = torch.cat(shares, dim=-1)
        return y[..., : self.vocab_size]


def _vocabulary_rows(axis: TensorAxis, vocab_size: int, hidden_size: int, std: float) -> tuple[nn.Parameter, int]:
    """This rank's rows of a (V, H) matrix, padded in memory only, and the id of its first row."""
    rows = padded_vocabulary(vocab_size) // axis.size
    first = rows * axis.rank
    real = max(0, min(rows, vocab_size - first))
    piece = Piece("", (vocab_size, hidden_size), (min(first, vocab_size), 0), (real, hidden_size))
    weight = describe(nn.Parameter(torch.empty(rows, hidden_size)), Initial("normal", std), (piece,))
    return mark_cut(weight, axis, 0), first


def _vocabulary_bias(axis: TensorAxis, vocab_size: int) -> nn.Parameter:
    """Of this rank's rows (V,)."""
    rows = padded_vocabulary(vocab_size) // axis.size
    first = min(rows * axis.rank, vocab_size)
    piece = Piece("", (vocab_size,), (first,), (max(0, min(rows, vocab_size - first)),))
    bias = describe(nn.Parameter(torch.empty(rows)), Initial("zeros"), (piece,), decay=False)
    mark_cut(bias, axis, 0)
    return bias
