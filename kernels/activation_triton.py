"""An activation and its bias as one operator that torch.compile sees as a differentiable step: `kernels.activation`.

Triton is imported when a kernel is first launched, never with this module. `launch` is called once for each launch, with the
kernel's name.

Shapes: M rows, F features of the output, W of the input: 2 F (gate, up) if gated, else F.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.rows import power, rows_of, strip_rows

COLUMNS = 1024  # of a tile at most
ELEMENTS = 2048  # of a tile: 16 a thread, two accesses of 128 bits of each 16-bit tensor
NUM_WARPS = 4


@torch.library.custom_op("kernels::activation", mutates_args=())
def activate(x: Tensor, bias: Tensor | None, curve: str, gated: bool) -> Tensor:
    """curve(x + bias), or of the first half of the features, times the second half: x (..., W), bias (W,) -> (..., F).

    curve: gelu, gelu-tanh, silu or relu.
    """
    out = x.new_empty(_shape(x, gated))
    if out.numel():
        rows, width = rows_of(x), out.shape[-1]
        tiles = -(-len(rows) // tile_of(width)[0])
        launch("activation_kernel", tiles, bias, curve, gated, rows, out, len(rows), rows.stride(0), width)
    return out


@activate.register_fake
def _(x: Tensor, bias: Tensor | None, curve: str, gated: bool) -> Tensor:
    return x.new_empty(_shape(x, gated))


@torch.library.custom_op("kernels::activation_backward", mutates_args=())
def differentiate(grad: Tensor, x: Tensor, bias: Tensor | None, curve: str, gated: bool) -> tuple[Tensor, Tensor]:
    """-> the gradients of x and of bias (of none: (0,)), from that of the output (..., F)."""
    slope = x.new_empty(x.shape)
    if not grad.numel():
        return slope, _like(bias, x).zero_()
    rows, grads, width = rows_of(x), rows_of(grad), grad.shape[-1]
    tile = tile_of(width)[0]
    step = tile if bias is None else strip_rows(len(rows), x.shape[-1], tile)
    strips = -(-len(rows) // step)
    sums = torch.empty(strips if bias is not None else 0, x.shape[-1], dtype=torch.float32, device=x.device)
    numbers = (len(rows), grads.stride(0), rows.stride(0), width, step)
    launch("activation_backward_kernel", strips, bias, curve, gated, rows, grads, slope, sums, *numbers)
    return slope, _like(bias, x) if bias is None else sums.sum(0).to(bias.dtype)


@differentiate.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor | None, curve: str, gated: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _like(bias, x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, *ctx.options = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    of_x, of_bias = torch.ops.kernels.activation_backward(grad, x, bias, *ctx.options)
    return of_x, None if bias is None else of_bias, None, None


activate.register_autograd(_backward, setup_context=_save)


def launch(name: str, strips: int, bias: Tensor | None, curve: str, gated: bool, x: Tensor, *rest: Any) -> None:
    """A program for each strip of rows and block of columns. x (M, W); rest: what the kernel takes after x and bias."""
    from kernels.triton import activation as kernels  # here, so that importing this module needs no triton

    width = x.shape[1] // 2 if gated else x.shape[1]
    rows, columns = tile_of(width)
    with torch.cuda.device_of(x):  # Triton launches on the current device; on a CPU this does nothing
        getattr(kernels, name)[(strips, -(-width // columns))](
            x, x if bias is None else bias.contiguous(), *rest, CURVE=curve, GATED=gated, BIASED=bias is not None,
            ROWS=rows, COLUMNS=columns, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def tile_of(width: int) -> tuple[int, int]:
    """Rows and columns of a tile for so many features."""
    columns = min(COLUMNS, power(width))
    return max(1, ELEMENTS // columns), columns


def _shape(x: Tensor, gated: bool) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1])


def _like(bias: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
