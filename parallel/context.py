"""Attention where ranks share each sequence, by exchanging heads (Jacobs et al. 2023, "DeepSpeed Ulysses").

Before: each of C ranks holds a slice of the sequence of all its heads. One all-to-all later it holds the whole sequence of
a C-th of the heads, runs the ordinary attention on it, and a second all-to-all gives back its slice. Head n of the exchanged
is head `first_head + rank * N / C + n` of the model, so dropout masks, ALiBi slopes and relative biases are those of one process.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from kernels.backends import Backend, attend
from parallel import library
from parallel.axes import ContextAxis


def exchanged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axis: ContextAxis,
    *,
    backend: Backend = "torch",
    first_head: int = 0,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """q (B, S, N, D), k and v (B, S, G, D) of this rank's slice -> (B, S, N, D); N a multiple of the context ranks.

    Fewer or indivisible key/value heads are repeated until each rank gets a whole number of them.
    """
    layer = _exchange(axis, backend)
    heads, groups = q.shape[2] // axis.size, k.shape[2]
    if groups % axis.size:
        repeats = axis.size // math.gcd(groups, axis.size)
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    mine = axis.rank * heads
    if slopes is not None:
        slopes = slopes[mine : mine + heads]
    if bias is not None:
        bias = bias[
            mine : mine + heads
        ]  # so of the whole table's gradient a rank has the rows of its heads, others are 0
    return layer(q, k, v, 0, None, first_head=first_head + mine, slopes=slopes, bias=bias, **options)


def _exchange(axis: ContextAxis, backend: Backend) -> torch.nn.Module:
    library.deepspeed()
    from deepspeed.sequence.layer import DistributedAttention

    return DistributedAttention(functools.partial(attend, backend), axis.group, scatter_idx=2, gather_idx=1)


def summed(x: Tensor, group: Any) -> Tensor:
    """Sum of every rank's x over the group, forward and backward."""
    return _Sum.apply(x, group)  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None
