"""Gradient of a relative position bias (`kernels.relative`): sums of dS over the buckets of distances.

One program walks down a diagonal of square tiles. All its tiles have the same distances at the same elements, so their dS add
up element by element, in registers; only then is the one sum divided among the buckets that occur in it. Most diagonals lie
far from distance 0, where a tile has one bucket or two. Nothing is added atomically: a program has its own row of sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.attention import biases, load_tile, visible_keys
from kernels.triton.attention_backward import score_gradients
from kernels.triton.noise import row_keys, site_key


@triton.jit
def _tile(
    q, k, v, grad, lse, delta, noise, rows, first, last, batch, head, group, begin, at, q_strides, k_strides,
    v_strides, grad_strides, S, T, first_query, relative, scale, cap, threshold, keep_scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of the queries from `begin` and the keys from `at` on."""
    queries = load_tile(q, batch, head, begin, q_strides, S, BLOCK_M, SIZE, WIDTH, DESCRIPTOR, True)
    above = load_tile(grad, batch, head, begin, grad_strides, S, BLOCK_M, SIZE, WIDTH, DESCRIPTOR, True)
    sums = tl.load(lse + rows, mask=rows < S, other=0.0)
    shares = tl.load(delta + rows, mask=rows < S, other=0.0)
    if DROPOUT:
        noise = row_keys(noise, rows + first_query)
    _, _, product = score_gradients(
        queries, above, sums, shares, k, v, noise, rows, first, last, batch, group, at, k_strides, v_strides, T,
        begin, first_query, 0.0, relative, scale, cap, threshold, keep_scale,
        SIZE, WIDTH, BLOCK_M, BLOCK_N, False, True, SOFTCAP, DROPOUT, DESCRIPTOR, True, PRECISION,
    )  # fmt: skip
    return product


@triton.jit(do_not_specialize=["first_query", "window", "first_head", "site", "threshold", "lowest"])
def bias_kernel(
    q, k, v, grad, lse, delta, sums, limits, bias, keys, low, high, q_strides, k_strides, v_strides, grad_strides,
    S, T, N, ratio, lowest, first_query, window, first_head, site, threshold, keep_scale, scale, cap,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """sums (diagonals, B, N, BUCKETS), zeros before, of the diagonal of tiles whose key block is its query block + lowest +
    the program's number; grid (diagonals, N, B). BLOCK_M is BLOCK_N.

    limits (BUCKETS,) int32: where each bucket begins, the first at the lowest integer, and behind the last the largest.
    """
    number, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    diagonal = number + lowest
    row = (tl.cast(batch, tl.int64) * N + head) * S
    relative = biases(bias, head, S)
    noise = 0
    if DROPOUT:
        noise = site_key(keys, batch, head + first_head, site)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    stop = tl.minimum(tl.cdiv(S, BLOCK_M), tl.cdiv(T, BLOCK_N) - diagonal)
    for block in tl.range(tl.maximum(0, -diagonal), stop):
        begin, at = tl.multiple_of(block * BLOCK_M, BLOCK_M), tl.multiple_of((block + diagonal) * BLOCK_N, BLOCK_N)
        rows = begin + tl.arange(0, BLOCK_M)
        first, last = visible_keys(rows, batch, S, T, first_query, window, low, high, CAUSAL, WINDOW, DOCUMENTS)
        meets = True
        if DOCUMENTS:
            meets = tl.max(tl.minimum(last, at + BLOCK_N) - tl.maximum(first, at), 0) > 0
        if meets:
            acc += _tile(
                q, k, v, grad, lse + row, delta + row, noise, rows, first, last, batch, head, head // ratio, begin, at,
                q_strides, k_strides, v_strides, grad_strides, S, T, first_query, relative, scale, cap, threshold,
                keep_scale, SIZE, WIDTH, BLOCK_M, BLOCK_N, SOFTCAP, DROPOUT, DESCRIPTOR, PRECISION,
            )  # fmt: skip
    nearest = diagonal * BLOCK_N - first_query  # distance from the first query of a tile to its first key
    distance = nearest + tl.arange(0, BLOCK_N)[None, :] - tl.arange(0, BLOCK_M)[:, None]
    begins = tl.load(limits + tl.arange(0, BUCKETS))
    target = sums + ((tl.cast(number, tl.int64) * tl.num_programs(2) + batch) * N + head) * BUCKETS
    lowest_bucket = tl.sum((begins <= nearest - BLOCK_M + 1).to(tl.int32), 0) - 1
    highest_bucket = tl.sum((begins <= nearest + BLOCK_N - 1).to(tl.int32), 0) - 1
    for bucket in tl.range(lowest_bucket, highest_bucket + 1):
        inside = (distance >= tl.load(limits + bucket)) & (distance < tl.load(limits + bucket + 1))
        tl.store(target + bucket, tl.sum(tl.where(inside, acc, 0.0)))
