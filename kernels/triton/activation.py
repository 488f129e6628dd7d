"""A feed-forward layer's activation with the bias before it, forward and backward; all arithmetic is float32.

A tile has some rows and a block of columns; a gated activation reads it twice, F columns apart. The backward pass takes
the activation's input again and computes what it needs anew: nothing else is kept between the two.

Shapes: M rows, F features of the output, W of the input: 2 F (gate, up) if gated, else F.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROOT_HALF = tl.constexpr(0.7071067811865476)  # sqrt(1 / 2)
ROOT_TURN = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)  # of GELU's tanh form


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _curve(x, CURVE: tl.constexpr):
    """The activation at x and its slope there; tanh(u) is 2 sigmoid(2 u) - 1.

    The interpreter multiplies a constant only from the right."""
    if CURVE == "relu":  # not by a maximum, which loses NaN
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    if CURVE == "silu":
        share = _sigmoid(x)
        return x * share, share * (1.0 + x * (1.0 - share))
    if CURVE == "gelu-tanh":
        square = x * x
        share = _sigmoid(x * TWICE_ROOT * (square * CUBIC + 1.0))
        inner = (square * (3.0 * CUBIC) + 1.0) * TWICE_ROOT
        return x * share, share + x * share * (1.0 - share) * inner
    share = 0.5 * (1.0 + tl.erf(x * ROOT_HALF))
    return x * share, share + x * ROOT_TURN * tl.exp(-0.5 * x * x)


@triton.jit
def _load(lines, bias, columns, mask, width, BIASED: tl.constexpr):
    x = tl.load(lines + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit(do_not_specialize=["rows"])
def activation_kernel(
    x, bias, out, rows, stride, width,
    CURVE: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x (M, W), `stride` from row to row, bias (W,) -> out (M, F)."""
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (places < rows)[:, None] & (columns < width)[None, :]
    lines = x + places[:, None] * stride
    value, _ = _curve(_load(lines, bias, columns, mask, width, BIASED), CURVE)
    if GATED:
        value *= _load(lines + width, bias + width, columns, mask, width, BIASED)
    tl.store(out + places[:, None] * width + columns[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "step"])
def activation_backward_kernel(
    x, bias, grad, slope, partial, rows, grad_stride, stride, width, step,
    CURVE: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad (M, F), of the output -> slope (M, W), that of x; partial (strips, W) float32, its sums over the `step` rows of
    each strip, where there is a bias."""
    strip, all_columns = tl.program_id(0), (2 if GATED else 1) * width
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sum_gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(strip * step, tl.minimum((strip + 1) * step, rows), ROWS):
        places = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (places < rows)[:, None] & (columns < width)[None, :]
        lines = x + places[:, None] * stride
        into = slope + places[:, None] * all_columns + columns[None, :]
        dy = tl.load(grad + places[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        value, rise = _curve(_load(lines, bias, columns, mask, width, BIASED), CURVE)
        if GATED:
            up = _load(lines + width, bias + width, columns, mask, width, BIASED)
            d_up = dy * value
            tl.store(into + width, d_up.to(slope.dtype.element_ty), mask=mask)
            sum_up += d_up
            dy *= up
        d_gate = dy * rise
        tl.store(into, d_gate.to(slope.dtype.element_ty), mask=mask)
        sum_gate += d_gate
    if BIASED:
        sums = partial + strip.to(tl.int64) * all_columns + columns
        tl.store(sums, tl.sum(sum_gate, 0), mask=columns < width)
        if GATED:
            tl.store(sums + width, tl.sum(sum_up, 0), mask=columns < width)
