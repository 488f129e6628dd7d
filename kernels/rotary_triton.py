"""Rotary positions of queries and keys as one operator that torch.compile sees as a differentiable step: `kernels.rotary`.

Triton is imported when a kernel is first launched, never with this module. `launch` is called once for each launch, with the
kernel's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.rows import power

ELEMENTS = 2048  # of a tile of one half of the features at most: 16 a thread of 4 warps
LANES = 8  # elements of such a tile that a thread has, where it is smaller


@torch.library.custom_op("kernels::rotary", mutates_args=())
def turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q (B, S, N, D) and k (B, S, G, D) turned by cos and sin (P, D/2), float32, of the rows `positions` (B, S), int, or of
    a token's place in its sequence; inverse: the other way. Results have no gaps."""
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() or k.numel():
        launch("rotary_kernel", _heads(q), _heads(k), cos.contiguous(), sin.contiguous(), positions, *out, inverse)
    return out


@turn.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.kernels.rotary(of_q, of_k, *ctx.saved_tensors, not ctx.inverse), None, None, None, None


turn.register_autograd(_backward, setup_context=_save)


def launch(
    name: str,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    inverse: bool,
) -> None:
    """A program for each token."""
    from kernels.triton import rotary as kernels  # here, so that importing this module needs no triton

    batch, length, heads, size = q.shape
    groups, columns = k.shape[2], power(size // 2)
    tile = min(power(max(heads, groups)), max(1, ELEMENTS // columns))
    with torch.cuda.device_of(q):  # Triton launches on the current device; on a CPU this does nothing
        getattr(kernels, name)[(batch * length,)](
            q, k, cos, sin, cos if positions is None else positions.contiguous(), q_out, k_out, length, heads, groups,
            *q.stride()[:3], *k.stride()[:3], PLACED=positions is not None, INVERSE=inverse, HALF=size // 2,
            HEADS=tile, COLUMNS=columns, num_warps=max(1, min(4, tile * columns // (32 * LANES))), enable_fp_fusion=True,
        )  # fmt: skip


def _heads(x: Tensor) -> Tensor:
    """x with each head in one piece."""
    return x if x.stride(3) == 1 else x.contiguous()
