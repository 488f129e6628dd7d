"""A norm with the residual sum before it as one operator that torch.compile sees as a differentiable step: `kernels.norm`.

Triton is imported when a kernel is first launched, never with this module. `launch` is called once for each launch, with the
kernel's name.

Shapes: B batch, S rows of a sequence, W features; M = B S.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.noise import _i32
from kernels.rows import power, rows_of, strip_rows

ELEMENTS = 2048  # of a tile, or one row: 16 a thread, two accesses of 128 bits of each 16-bit tensor
LANES = 16  # elements a thread
MOST_WARPS = 16
MOST_ROWS = 32  # of a tile
MOST_REGISTERS = 128  # a thread of layer norm's backward pass: two programs of 8 warps at once on a multiprocessor
LARGEST_ROW = 16384  # bytes: it is in registers whole, and with it its share of the weight's gradient


class Options(NamedTuple):
    """What a norm is, besides its tensors."""

    layer: bool
    epsilon: float
    dropout: float
    site: int
    first_row: int


def unsupported_width(width: int, dtype: torch.dtype) -> str:
    """Why the kernels cannot take rows of so many features of a type: one phrase, "" if they can."""
    most = LARGEST_ROW // dtype.itemsize
    return "" if width <= most else f"rows of at most {most:,} features are supported, found {width:,}"


@torch.library.custom_op("kernels::norm", mutates_args=())
def normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, keys: Tensor | None,
    layer: bool, epsilon: float, dropout: float, site: int, first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x and residual (..., S, W), weight and bias (W,), keys (B,) int32 -> the norm of the sum; the sum, (0,) where there is
    no residual; statistics (2, M) float32, for the backward."""
    options = Options(layer, epsilon, dropout, site, first_row)
    out, total, statistics = _results(x, residual)
    if x.numel():
        rows, added = rows_of(x), rows_of(x if residual is None else residual)
        tensors = (rows, added, weight.contiguous(), bias, keys, out, total, statistics)
        numbers = (len(rows), rows.stride(0), added.stride(0), x.shape[-1], epsilon)
        launch("norm_kernel", x, 1, tensors, numbers, options, bias is not None, residual is not None)
    return out, total, statistics


@normalise.register_fake
def _(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(x, residual)


@torch.library.custom_op("kernels::norm_backward", mutates_args=())
def differentiate(
    grad: Tensor, of_total: Tensor | None, total: Tensor, weight: Tensor, keys: Tensor | None, statistics: Tensor,
    biased: bool, layer: bool, epsilon: float, dropout: float, site: int, first_row: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> the gradients of the residual (or of x, where there is none); of x where there is dropout, else (0,); and of weight
    and bias, (2, W) or (1, W) float32. grad: of the norm; of_total: of the sum itself."""
    options = Options(layer, epsilon, dropout, site, first_row)
    of_residual, of_x, of_weights = _gradients(total, biased, dropout)
    if not total.numel():
        return of_residual, of_x, of_weights.zero_()
    grads, totals = rows_of(grad), rows_of(total)
    others, width = totals if of_total is None else rows_of(of_total), total.shape[-1]
    tile = tile_of(width)[0]
    step = strip_rows(len(totals), width, tile)
    strips = -(-len(totals) // step)
    sums = torch.empty(1 + biased, strips, width, dtype=torch.float32, device=total.device)
    tensors = (grads, others, totals, weight.contiguous(), keys, statistics, of_residual, of_x, sums)
    numbers = (len(totals), grads.stride(0), others.stride(0), totals.stride(0), width, step)
    launch("norm_backward_kernel", total, step // tile, tensors, numbers, options, biased, of_total is not None)
    return of_residual, of_x, sums.sum(1)


@differentiate.register_fake
def _(
    grad: Tensor, of_total: Tensor | None, total: Tensor, weight: Tensor, keys: Tensor | None, statistics: Tensor,
    biased: bool, layer: bool, epsilon: float, dropout: float, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(total, biased, dropout)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, keys, *ctx.options = inputs
    _, total, statistics = output
    ctx.set_materialize_grads(False)  # a sum that nobody uses has no gradient, rather than one of zeros to be read
    ctx.added, ctx.bias = residual is not None, None if bias is None else bias.dtype
    ctx.save_for_backward(x if residual is None else total, weight, keys, statistics)


def _backward(ctx: Any, grad: Tensor | None, of_total: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    total, weight, keys, statistics = ctx.saved_tensors
    grad = torch.zeros_like(total) if grad is None else grad
    of_total = of_total if ctx.added else None
    biased = ctx.bias is not None
    of_residual, of_x, of_weights = torch.ops.kernels.norm_backward(
        grad, of_total, total, weight, keys, statistics, biased, *ctx.options
    )
    of_x = of_x if of_x.numel() else of_residual
    of_bias = of_weights[1].to(ctx.bias) if biased else None
    return of_x, of_residual if ctx.added else None, of_weights[0].to(weight.dtype), of_bias, *[None] * 6


normalise.register_autograd(_backward, setup_context=_save)


def launch(
    name: str, x: Tensor, tiles: int, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...], options: Options,
    biased: bool, added: bool,
) -> None:  # fmt: skip
    """A program for each `tiles` tiles of the rows of x (..., S, W)."""
    from kernels.triton import norm as kernels  # here, so that importing this module needs no triton

    rows, columns = tile_of(x.shape[-1])
    programs = -(-x.numel() // x.shape[-1] // (rows * tiles))
    length = x.shape[-2] if x.ndim > 1 else 1
    threshold, scale = math.floor(options.dropout * 2**32) - 2**31, 1.0 / (1.0 - options.dropout)
    places = (length, options.first_row, _i32(options.site * 0x9E3779B9), threshold, scale)
    with torch.cuda.device_of(x):  # Triton launches on the current device; on a CPU this does nothing
        getattr(kernels, name)[(programs,)](
            *(x if tensor is None else tensor for tensor in tensors), *numbers, *places, CENTRED=options.layer,
            BIASED=biased, ADDED=added, DROPPED=options.dropout > 0, ROWS=rows, COLUMNS=columns,
            num_warps=max(1, min(MOST_WARPS, rows * columns // (32 * LANES))), enable_fp_fusion=True,
            maxnreg=MOST_REGISTERS if options.layer and name == "norm_backward_kernel" else None,
        )  # fmt: skip


def tile_of(width: int) -> tuple[int, int]:
    """Rows and columns of a tile for so many features."""
    columns = power(width)
    return max(1, min(MOST_ROWS, ELEMENTS // columns)), columns


def _results(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    statistics = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), statistics


def _gradients(total: Tensor, biased: bool, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    of_weights = torch.empty(1 + biased, total.shape[-1], dtype=torch.float32, device=total.device)
    return total.new_empty(total.shape), total.new_empty(total.shape if dropout else 0), of_weights
