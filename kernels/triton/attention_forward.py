"""Forward of attention in tiles (Dao 2023, "FlashAttention-2"): one program for BLOCK_M queries of one head.

Scores are kept in base 2 (times log2(e)), so that exp is one instruction and a row's maximum enters lse unrounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.attention import biased, biases, capped, load_tile, store_tile, stretches, visible_keys
from kernels.triton.noise import kept, row_keys, site_key

LOWEST = tl.constexpr(-1e30)  # finite: the maximum of a row that has seen no key yet


@triton.jit
def _walk(
    acc, total, maximum, q, k, v, rows, first, last, noise, batch, group, start, stop, k_strides, v_strides, T,
    begin, first_query, slope, relative, scale, cap, threshold,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOPES: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys start : stop, a multiple of BLOCK_N the first; MASK: not every row sees them all."""
    for at in tl.range(start, stop, BLOCK_N):
        at = tl.multiple_of(at, BLOCK_N)
        columns = at + tl.arange(0, BLOCK_N)
        keys = load_tile(k, batch, group, at, k_strides, T, BLOCK_N, SIZE, WIDTH, DESCRIPTOR, MASK)
        scores = capped(tl.dot(q, keys.T, input_precision=PRECISION), scale, cap, SOFTCAP)
        if SLOPES:
            scores -= slope * tl.abs(rows[:, None] + first_query - columns[None, :]).to(tl.float32)
        if BIAS:
            scores = biased(
                scores, relative, rows[:, None], columns[None, :], begin, at, first_query, BLOCK_M, BLOCK_N
            )  # fmt: skip
        if MASK:
            seen = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(kept(noise[:, None], columns[None, :], threshold), weights, 0.0)
        values = load_tile(v, batch, group, at, v_strides, T, BLOCK_N, SIZE, WIDTH, DESCRIPTOR, MASK)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        maximum = higher
    return acc, total, maximum


@triton.jit(do_not_specialize=["first_query", "window", "first_head", "site", "threshold"])
def forward_kernel(
    q, k, v, out, lse, slopes, bias, keys, low, high, q_strides, k_strides, v_strides, S, T, N, ratio, first_query,
    window, first_head, site, threshold, keep_scale, scale, cap,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q (B, S, N, D), k and v (B, T, G, D) -> out, lse (B, N, S); grid (blocks of queries, N, B).

    bias: what `biases` takes, if BIAS. HEAD, TAIL: whether blocks before and after
    those seen whole may be seen in part.
    """
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block  # the longest first, so that none is left over at the end
    begin = block * BLOCK_M
    group = head // ratio
    rows = begin + tl.arange(0, BLOCK_M)
    first, last = visible_keys(rows, batch, S, T, first_query, window, low, high, CAUSAL, WINDOW, DOCUMENTS)
    start, whole, partial, stop = stretches(first, last, BLOCK_N, HEAD)
    queries = load_tile(q, batch, head, begin, q_strides, S, BLOCK_M, SIZE, WIDTH, DESCRIPTOR, True)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes + head).to(tl.float32) * 1.4426950408889634
    relative, noise = rows, rows
    if BIAS:
        relative = biases(bias, head, S)
    if DROPOUT:
        noise = row_keys(site_key(keys, batch, head + first_head, site), rows + first_query)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], LOWEST, tl.float32)
    for part in tl.static_range(3):
        if (part == 0 and HEAD) or part == 1 or (part == 2 and TAIL):
            acc, total, maximum = _walk(
                acc, total, maximum, queries, k, v, rows, first, last, noise, batch, group,
                start if part == 0 else (whole if part == 1 else partial),
                whole if part == 0 else (partial if part == 1 else stop),
                k_strides, v_strides, T, begin, first_query, slope, relative, scale, cap, threshold,
                SIZE, WIDTH, BLOCK_M, BLOCK_N, SLOPES, BIAS, SOFTCAP, DROPOUT, DESCRIPTOR, part != 1, PRECISION,
            )  # fmt: skip
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    acc = acc * tl.where(seen, keep_scale / total, 0.0)[:, None]
    store_tile(out, acc, batch, head, begin, N, S, BLOCK_M, SIZE, WIDTH)
    target = lse + (tl.cast(batch, tl.int64) * N + head) * S + rows
    tl.store(target, tl.where(seen, maximum + tl.log2(total), float("-inf")), mask=rows < S)
