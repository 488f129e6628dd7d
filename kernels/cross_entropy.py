"""The output matrix and its cross-entropy in one: sum over the targets of logsumexp(x W^T) - (x W^T)[target].

Logits over a vocabulary are the largest activation of a language model, so they are made for a chunk of rows at a time and
never kept. A chunk's gradient needs only its own logits: the forward pass computes it at once, scaled by 1, and the backward
pass multiplies by what the loss is multiplied by. Three products a chunk, nothing recomputed, one chunk of memory.

The vocabulary may be cut over a group of ranks (Shoeybi et al. 2019, section 3): a maximum, a sum of exponentials and a
target's logit then go around the group for each chunk, never the logits. Softmax and sums are float32 (float64 for float64).

Shapes: B batch, S sequence, M = B S rows, H hidden, V this rank's classes (padding included).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of float32 logits
MAX_CHUNKS = 16  # torch.compile unrolls them


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    vocab_size: int,
    first_class: int = 0,
    group: Any = None,
) -> Tensor:
    """Sum of the cross-entropy over the targets where mask is 1, a float32 scalar, the same on every rank of `group`.

    x (B, S, H); weight (V, H), whose row i is class first_class + i and rows from vocab_size on are padding that no
    probability reaches; targets (B, S) ids below vocab_size; mask (B, S) 0 or 1. The gradient of x is this rank's part
    of the sum over the group.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return _forward_only(rows, weight, targets.reshape(-1), mask.reshape(-1), vocab_size, first_class, group)
    return _Loss.apply(rows, weight, targets.reshape(-1), mask.reshape(-1), vocab_size, first_class, group)  # type: ignore


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Per-token cross-entropy (B, S), float32, of logits (B, S, V) and ids (B, S); for evaluation."""
    logits = _wide(logits)
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[..., None])[..., 0]


def chunk_rows(num_rows: int, num_classes: int) -> int:
    """Rows of logits made at a time: a function of the shape alone."""
    rows = max(1024, CHUNK_BYTES // (4 * num_classes))
    return max(rows, -(-num_rows // MAX_CHUNKS))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        mask: Tensor,
        vocab_size: int,
        first_class: int,
        group: Any,
    ) -> Tensor:
        total = _zero(x)
        grad_x, grad_weight = [], None
        step = chunk_rows(x.shape[0], weight.shape[0])
        for start in range(0, x.shape[0], step):
            here, some, counts = (t[start : start + step] for t in (x, targets, mask))
            logits, log_sum, at_target, local = _softmax_parts(here, weight, some, vocab_size, first_class, group)
            counts = counts.to(logits.dtype)
            total = total + ((log_sum - at_target) * counts).sum()
            is_target = torch.arange(weight.shape[0], device=x.device) == local[:, None]
            slope = (torch.exp(logits - log_sum[:, None]) - is_target.to(logits.dtype)) * counts[:, None]
            slope = slope.to(x.dtype)
            grad_x.append(slope @ weight)
            part = slope.t() @ here
            # chunks are summed in float32: bf16 sums would lose what a late chunk adds
            grad_weight = part if step >= x.shape[0] else _wide(part) if grad_weight is None else grad_weight + part
        assert grad_weight is not None
        ctx.save_for_backward(torch.cat(grad_x) if len(grad_x) > 1 else grad_x[0], grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return _times(grad_x, grads[0]), _times(grad_weight, grads[0]), None, None, None, None, None


def _forward_only(
    x: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, vocab_size: int, first_class: int, group: Any
) -> Tensor:
    total = _zero(x)
    step = chunk_rows(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[0], step):
        here, some, counts = (t[start : start + step] for t in (x, targets, mask))
        _, log_sum, at_target, _ = _softmax_parts(here, weight, some, vocab_size, first_class, group)
        total = total + ((log_sum - at_target) * counts.to(log_sum.dtype)).sum()
    return total


def _softmax_parts(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, first_class: int, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a chunk: logits (M, V) with the padding at -inf; log of the sum of exponentials (M,) and the target's logit (M,),
    both over the whole vocabulary; the target's place (M,) among this rank's classes, -1 where another rank has it."""
    logits = _wide(x @ weight.t())
    real = min(max(vocab_size - first_class, 0), weight.shape[0])
    if real < weight.shape[0]:
        columns = torch.arange(weight.shape[0], device=x.device)
        logits = torch.where(columns < real, logits, -torch.inf)
    local = targets - first_class
    local = torch.where((local >= 0) & (local < real), local, -1)
    at_target = logits.gather(1, local.clamp(min=0)[:, None])[:, 0]
    if group is None:
        return logits, torch.logsumexp(logits, dim=1), at_target, local
    at_target = torch.where(local >= 0, at_target, 0.0)
    highest = _reduced(logits.amax(dim=1), group, torch.distributed.ReduceOp.MAX)
    sums = torch.stack((torch.exp(logits - highest[:, None]).sum(dim=1), at_target))
    sums = _reduced(sums, group, torch.distributed.ReduceOp.SUM)
    return logits, highest + torch.log(sums[0]), sums[1], local


def _reduced(x: Tensor, group: Any, operation: Any) -> Tensor:
    torch.distributed.all_reduce(x, op=operation, group=group)
    return x


def _times(gradient: Tensor, scale: Tensor) -> Tensor:
    return (_wide(gradient) * scale).to(gradient.dtype)


def _zero(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
