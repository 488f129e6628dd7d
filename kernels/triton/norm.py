"""Layer and root-mean-square norm, with the residual sum and its dropout before them, forward and backward; float32 inside.

A tile has some whole rows. The forward pass stores the sum, in its own type, and takes the statistics from what it stored,
so that the backward pass, which reads it again, sees the same rows. There a program has a strip of tiles and adds up the
weight's gradient on its way.

Shapes: M = B S rows, W features; COLUMNS, a power of two, holds W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.noise import activation_rows, kept


@triton.jit
def _stays(keys, places, columns, rows, length, first_row, site, threshold):
    """Which elements dropout keeps, of the rows at `places` (int64) and columns."""
    batches, row = (places // length).to(tl.int32), (places % length).to(tl.int32)
    row_keys = activation_rows(keys, batches, row + first_row, site, places < rows)
    return kept(row_keys[:, None], columns[None, :], threshold)


@triton.jit(do_not_specialize=["rows", "length", "first_row", "site", "threshold"])
def norm_kernel(
    x, residual, weight, bias, keys, out, total, statistics, rows, x_stride, residual_stride, width, epsilon,
    length, first_row, site, threshold, scale,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, DROPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x, residual (M, W) with their strides, weight and bias (W,), keys (B,) int32 -> total, the sum of the residual and of x
    after dropout, where there is a residual (ADDED); out (M, W), its norm, layer where CENTRED; statistics (2, M) float32,
    each row's mean (of layer norm) and the inverse of its deviation (of rms norm its root mean square)."""
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    seen = (columns < width)[None, :]
    mask = (places < rows)[:, None] & seen
    into = places[:, None] * width + columns[None, :]
    values = tl.load(x + places[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROPPED:
        stays = _stays(keys, places, columns, rows, length, first_row, site, threshold)
        values = tl.where(stays, values * scale, 0.0)
    if ADDED:
        values += tl.load(residual + places[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + into, rounded, mask=mask)
        values = rounded.to(tl.float32)
    if CENTRED:
        mean = tl.sum(values, 1) / width
        tl.store(statistics + places, mean, mask=places < rows)
        values = tl.where(seen, values - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 1) / width + epsilon)
    tl.store(statistics + rows + places, inverse, mask=places < rows)
    values *= inverse[:, None]
    values *= tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        values += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out + into, values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "step", "length", "first_row", "site", "threshold"])
def norm_backward_kernel(
    grad, of_total, total, weight, keys, statistics, of_residual, of_x, sums, rows, grad_stride, of_total_stride,
    total_stride, width, step, length, first_row, site, threshold, scale,
    CENTRED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, DROPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad, that of the norm, and of_total, that of the sum itself where ADDED, and total, all (M, W) with their strides ->
    of_residual (M, W), the whole gradient of the sum; of_x (M, W), that before dropout, where DROPPED; sums (2, strips, W)
    float32, over each strip's `step` rows: the gradient of the weight, and where BIASED of the bias."""
    strip, strips = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, COLUMNS)
    seen = columns < width
    w = tl.load(weight + columns, mask=seen, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(strip * step, tl.minimum((strip + 1) * step, rows), ROWS):
        places = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (places < rows)[:, None] & seen[None, :]
        into = places[:, None] * width + columns[None, :]
        values = tl.load(total + places[:, None] * total_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(grad + places[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(statistics + rows + places, mask=places < rows, other=0.0)[:, None]
        if CENTRED:
            values -= tl.load(statistics + places, mask=places < rows, other=0.0)[:, None]
        values *= inverse  # beyond the width, where it means nothing, dy is 0
        of_weight += dy * values
        if BIASED:
            of_bias += dy
        dy *= w
        slope = dy - values * (tl.sum(dy * values, 1) / width)[:, None]
        if CENTRED:
            slope -= (tl.sum(dy, 1) / width)[:, None]
        slope *= inverse
        if ADDED:
            slope += tl.load(of_total + places[:, None] * of_total_stride + columns[None, :], mask=mask, other=0.0)
        tl.store(of_residual + into, slope.to(of_residual.dtype.element_ty), mask=mask)
        if DROPPED:
            stays = _stays(keys, places, columns, rows, length, first_row, site, threshold)
            tl.store(of_x + into, tl.where(stays, slope * scale, 0.0).to(of_x.dtype.element_ty), mask=mask)
    at = sums + strip.to(tl.int64) * width + columns
    tl.store(at, tl.sum(of_weight, 0), mask=seen)
    if BIASED:
        tl.store(at + strips.to(tl.int64) * width, tl.sum(of_bias, 0), mask=seen)
