"""Cross-entropy over logits that are there: one pass for a row's statistics, one that writes the slope over the logits.

One program for a row, in blocks of classes; a block that is whole is moved without masks, the last one under a mask whose
edge is the matrix's own width, so that both go in accesses of 128 bits. All arithmetic is float32.

Shapes: M rows, V this rank's classes, of which the first `real` are no padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # finite: the maximum of a row that has seen no class yet


@triton.jit
def _load(line, columns, width, real, WHOLE: tl.constexpr):
    """float32 (BLOCK,), -inf where there is no class."""
    if WHOLE:
        return tl.load(line + columns).to(tl.float32)
    values = tl.load(line + columns, mask=columns < width, other=0.0).to(tl.float32)
    return tl.where(columns < real, values, float("-inf"))


@triton.jit
def _seen(maximum, total, summed, values, columns, real, SUMMED: tl.constexpr, WHOLE: tl.constexpr):
    """The running maximum of the row, and each lane's sums of exponentials and of logits, one block further on."""
    higher = tl.maximum(maximum, tl.max(values, 0))
    total = total * tl.exp(maximum - higher) + tl.exp(values - higher)
    if SUMMED:
        summed += values if WHOLE else tl.where(columns < real, values, 0.0)
    return higher, total, summed


@triton.jit(do_not_specialize=["rows", "real", "first_class"])
def statistics_kernel(
    logits, targets, statistics, rows, stride, width, real, first_class,
    SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits (M, V), `stride` from row to row; targets (M,) int64, global ids -> statistics (4, M) float32: the maximum, the
    sum of exponentials of the distance from it, the target's logit (0 where it is another rank's), and the sum of logits."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    places = tl.arange(0, BLOCK)
    maximum = tl.cast(LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    whole = real // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        columns = tl.multiple_of(start, BLOCK) + places
        values = _load(line, columns, width, real, True)
        maximum, total, summed = _seen(maximum, total, summed, values, columns, real, SUMMED, True)
    if whole < real:
        columns = tl.multiple_of(whole, BLOCK) + places
        values = _load(line, columns, width, real, False)
        maximum, total, summed = _seen(maximum, total, summed, values, columns, real, SUMMED, False)
    target = tl.load(targets + row) - first_class
    ours = (target >= 0) & (target < real)
    own = tl.load(line + target, mask=ours, other=0.0).to(tl.float32)
    out = statistics + row
    tl.store(out, maximum)
    tl.store(out + rows, tl.sum(total, 0))
    tl.store(out + 2 * rows, own)
    tl.store(out + 3 * rows, tl.sum(summed, 0))


@triton.jit
def _sloped(values, columns, target, maximum, scale, taken, share, real, SMOOTHED: tl.constexpr, WHOLE: tl.constexpr):
    slope = tl.exp(values - maximum) * scale
    slope -= tl.where(columns == target, taken, 0.0)
    if SMOOTHED:
        slope -= share if WHOLE else tl.where(columns < real, share, 0.0)
    return slope


@triton.jit(do_not_specialize=["rows", "real", "first_class"])
def slope_kernel(
    logits, targets, counts, statistics, rows, stride, width, real, first_class, confidence, share, z_loss,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes over logits (M, V) the slope of the loss: (softmax (1 + 2 z_loss logsumexp) - confidence [target] - share) times
    counts (M,) float32, 0 for padding. statistics (4, M): of the whole vocabulary, as `statistics_kernel` gives them."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    places = tl.arange(0, BLOCK)
    target = (tl.load(targets + row) - first_class).to(tl.int32)
    count = tl.load(counts + row)
    maximum = tl.load(statistics + row)
    total = tl.load(statistics + rows + row)
    scale = count * (1.0 + 2.0 * z_loss * (maximum + tl.log(total))) / total
    taken = confidence * count
    share = share * count
    whole = real // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        columns = tl.multiple_of(start, BLOCK) + places
        values = _load(line, columns, width, real, True)
        slope = _sloped(values, columns, target, maximum, scale, taken, share, real, SMOOTHED, True)
        tl.store(line + columns, slope.to(logits.dtype.element_ty))
    for start in tl.range(whole, width, BLOCK):
        columns = tl.multiple_of(start, BLOCK) + places
        values = _load(line, columns, width, real, False)
        slope = _sloped(values, columns, target, maximum, scale, taken, share, real, SMOOTHED, False)
        slope = tl.where(columns < real, slope, 0.0)
        tl.store(line + columns, slope.to(logits.dtype.element_ty), mask=columns < width)
