"""Backward of attention in tiles (Dao 2023, "FlashAttention-2", algorithm 2) without atomic additions.

One kernel walks over the queries of a block of keys and sums dK and dV, over all heads that read them; another walks over
the keys of a block of queries and sums dQ. Each computes the probabilities anew: a seventh product more than with atomics,
for gradients whose every sum has one order.

With s the scores, P the probabilities, Z the kept ones times 1 / (1 - rate) and O = (P Z) V:
dV = (P Z)^T dO, dP = (dO V^T) Z, dS = P (dP - delta), delta = rowsum(dO O), dQ = dS K * scale, dK = dS^T Q * scale.
A relative bias is added to S, so its gradient is dS too, summed elsewhere (`kernels.triton.attention_bias`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.attention import (
    biased,
    biases,
    capped,
    load_tile,
    store_tile,
    stretches,
    visible_keys,
    visible_queries,
)
from kernels.triton.noise import kept, row_keys, site_key


@triton.jit
def delta_kernel(out, grad, delta, grad_strides, S, N, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta (B, N, S): the sum over D of out (contiguous) times grad (B, S, N, D); grid (blocks of queries, N, B)."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = block * BLOCK_M
    out_strides = (tl.cast(S, tl.int64) * N * SIZE, SIZE, N * SIZE)
    ours = load_tile(out, batch, head, begin, out_strides, S, BLOCK_M, SIZE, WIDTH, False, True)
    theirs = load_tile(grad, batch, head, begin, grad_strides, S, BLOCK_M, SIZE, WIDTH, False, True)
    rows = begin + tl.arange(0, BLOCK_M)
    sums = tl.sum(ours.to(tl.float32) * theirs.to(tl.float32), 1)
    tl.store(delta + (tl.cast(batch, tl.int64) * N + head) * S + rows, sums, mask=rows < S)


@triton.jit
def _uncapped(scores, product, cap, SOFTCAP: tl.constexpr):
    """product, a gradient of capped scores, as that of the scores before."""
    if SOFTCAP:
        ratio = scores / cap
        product = product * (1.0 - ratio * ratio)
    return product


@triton.jit
def _walk_queries(
    dk, dv, keys, values, q, grad, lse, delta, noise, columns, first, last, batch, head, start, stop, q_strides,
    grad_strides, S, begin, first_query, slope, relative, scale, cap, threshold, keep_scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOPES: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The queries start : stop of one head; all tiles are (keys, queries), so that probabilities stay in registers."""
    for at in tl.range(start, stop, BLOCK_M):
        at = tl.multiple_of(at, BLOCK_M)
        rows = at + tl.arange(0, BLOCK_M)
        inside = rows < S
        queries = load_tile(q, batch, head, at, q_strides, S, BLOCK_M, SIZE, WIDTH, DESCRIPTOR, MASK)
        sums = tl.load(lse + rows, mask=inside, other=0.0)
        scores = capped(tl.dot(keys, queries.T, input_precision=PRECISION), scale, cap, SOFTCAP)
        whole = scores
        if SLOPES:
            whole -= slope * tl.abs(rows[None, :] + first_query - columns[:, None]).to(tl.float32)
        if BIAS:
            whole = biased(
                whole, relative, rows[None, :], columns[:, None], at, begin, first_query, BLOCK_M, BLOCK_N
            )  # fmt: skip
        weights = tl.exp2(whole - sums[None, :])
        if MASK:
            seen = (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
            weights = tl.where(seen, weights, 0.0)
        above = load_tile(grad, batch, head, at, grad_strides, S, BLOCK_M, SIZE, WIDTH, DESCRIPTOR, MASK)
        keep = True
        if DROPOUT:
            keep = kept(row_keys(noise, rows + first_query)[None, :], columns[:, None], threshold)
        if VALUES:
            dropped = tl.where(keep, weights, 0.0) if DROPOUT else weights
            dv = tl.dot(dropped.to(above.dtype), above, dv, input_precision=PRECISION)
        if KEYS:
            product = tl.dot(values, above.T, input_precision=PRECISION)
            if DROPOUT:
                product = tl.where(keep, product * keep_scale, 0.0)
            product = weights * (product - tl.load(delta + rows, mask=inside, other=0.0)[None, :])
            product = _uncapped(scores, product, cap, SOFTCAP)
            dk = tl.dot(product.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["first_query", "window", "first_head", "site", "threshold"])
def key_kernel(
    q, k, v, grad, lse, delta, dk, dv, slopes, bias, keys, low, high, q_strides, k_strides, v_strides, grad_strides,
    S, T, N, ratio, first_query, window, first_head, site, threshold, keep_scale, scale, cap,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dk (if KEYS) and dv (if VALUES), (B, T, G, D), of BLOCK_N keys, summed over the ratio heads that read them; grid
    (blocks of keys, G, B)."""
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = block * BLOCK_N
    columns = begin + tl.arange(0, BLOCK_N)
    first, last = visible_queries(columns, batch, S, T, first_query, window, low, high, CAUSAL, WINDOW, DOCUMENTS)
    start, whole, partial, stop = stretches(first, last, BLOCK_M, HEAD)
    keys_tile = load_tile(k, batch, group, begin, k_strides, T, BLOCK_N, SIZE, WIDTH, DESCRIPTOR, True)
    values = load_tile(v, batch, group, begin, v_strides, T, BLOCK_N, SIZE, WIDTH, DESCRIPTOR, True)
    sum_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    sum_v = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for member in tl.range(0, ratio):
        head = group * ratio + member
        row = (tl.cast(batch, tl.int64) * N + head) * S
        slope, relative, noise = 0.0, 0, 0
        if SLOPES:
            slope = tl.load(slopes + head).to(tl.float32) * 1.4426950408889634
        if BIAS:
            relative = biases(bias, head, S)
        if DROPOUT:
            noise = site_key(keys, batch, head + first_head, site)
        for part in tl.static_range(3):
            if (part == 0 and HEAD) or part == 1 or (part == 2 and TAIL):
                sum_k, sum_v = _walk_queries(
                    sum_k, sum_v, keys_tile, values, q, grad, lse + row, delta + row, noise, columns, first, last,
                    batch, head,
                    start if part == 0 else (whole if part == 1 else partial),
                    whole if part == 0 else (partial if part == 1 else stop),
                    q_strides, grad_strides, S, begin, first_query, slope, relative, scale, cap, threshold, keep_scale,
                    SIZE, WIDTH, BLOCK_M, BLOCK_N, SLOPES, BIAS, SOFTCAP, DROPOUT, DESCRIPTOR, part != 1, PRECISION,
                    KEYS, VALUES,
                )  # fmt: skip
    if KEYS:
        store_tile(dk, sum_k * (scale * 0.6931471805599453), batch, group, begin, N // ratio, T, BLOCK_N, SIZE, WIDTH)
    if VALUES:
        store_tile(dv, sum_v * keep_scale, batch, group, begin, N // ratio, T, BLOCK_N, SIZE, WIDTH)


@triton.jit
def score_gradients(
    queries, above, sums, delta, k, v, noise, rows, first, last, batch, group, at, k_strides, v_strides, T,
    begin, first_query, slope, relative, scale, cap, threshold, keep_scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOPES: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys from `at` on, and of a tile (queries, keys) the capped scores and the gradient dS of the biased ones."""
    columns = at + tl.arange(0, BLOCK_N)
    keys = load_tile(k, batch, group, at, k_strides, T, BLOCK_N, SIZE, WIDTH, DESCRIPTOR, MASK)
    scores = capped(tl.dot(queries, keys.T, input_precision=PRECISION), scale, cap, SOFTCAP)
    whole = scores
    if SLOPES:
        whole -= slope * tl.abs(rows[:, None] + first_query - columns[None, :]).to(tl.float32)
    if BIAS:
        whole = biased(
            whole, relative, rows[:, None], columns[None, :], begin, at, first_query, BLOCK_M, BLOCK_N
        )  # fmt: skip
    weights = tl.exp2(whole - sums[:, None])
    if MASK:
        seen = (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
        weights = tl.where(seen, weights, 0.0)
    values = load_tile(v, batch, group, at, v_strides, T, BLOCK_N, SIZE, WIDTH, DESCRIPTOR, MASK)
    product = tl.dot(above, values.T, input_precision=PRECISION)
    if DROPOUT:
        keep = kept(noise[:, None], columns[None, :], threshold)
        product = tl.where(keep, product * keep_scale, 0.0)
    return keys, scores, weights * (product - delta[:, None])


@triton.jit
def _walk_keys(
    dq, queries, above, sums, delta, k, v, noise, rows, first, last, batch, group, start, stop, k_strides,
    v_strides, T, begin, first_query, slope, relative, scale, cap, threshold, keep_scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOPES: tl.constexpr,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys start : stop."""
    for at in tl.range(start, stop, BLOCK_N):
        at = tl.multiple_of(at, BLOCK_N)
        keys, scores, product = score_gradients(
            queries, above, sums, delta, k, v, noise, rows, first, last, batch, group, at, k_strides, v_strides,
            T, begin, first_query, slope, relative, scale, cap, threshold, keep_scale,
            SIZE, WIDTH, BLOCK_M, BLOCK_N, SLOPES, BIAS, SOFTCAP, DROPOUT, DESCRIPTOR, MASK, PRECISION,
        )  # fmt: skip
        product = _uncapped(scores, product, cap, SOFTCAP)
        dq = tl.dot(product.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["first_query", "window", "first_head", "site", "threshold"])
def query_kernel(
    q, k, v, grad, lse, delta, dq, slopes, bias, keys, low, high, q_strides, k_strides, v_strides, grad_strides, S, T,
    N, ratio, first_query, window, first_head, site, threshold, keep_scale, scale, cap,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (B, S, N, D) of BLOCK_M queries; grid (blocks of queries, N, B)."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block
    begin = block * BLOCK_M
    group = head // ratio
    rows = begin + tl.arange(0, BLOCK_M)
    first, last = visible_keys(rows, batch, S, T, first_query, window, low, high, CAUSAL, WINDOW, DOCUMENTS)
    start, whole, partial, stop = stretches(first, last, BLOCK_N, HEAD)
    queries = load_tile(q, batch, head, begin, q_strides, S, BLOCK_M, SIZE, WIDTH, DESCRIPTOR, True)
    above = load_tile(grad, batch, head, begin, grad_strides, S, BLOCK_M, SIZE, WIDTH, DESCRIPTOR, True)
    row = (tl.cast(batch, tl.int64) * N + head) * S
    sums = tl.load(lse + row + rows, mask=rows < S, other=0.0)
    shares = tl.load(delta + row + rows, mask=rows < S, other=0.0)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes + head).to(tl.float32) * 1.4426950408889634
    relative, noise = rows, rows
    if BIAS:
        relative = biases(bias, head, S)
    if DROPOUT:
        noise = row_keys(site_key(keys, batch, head + first_head, site), rows + first_query)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for part in tl.static_range(3):
        if (part == 0 and HEAD) or part == 1 or (part == 2 and TAIL):
            acc = _walk_keys(
                acc, queries, above, sums, shares, k, v, noise, rows, first, last, batch, group,
                start if part == 0 else (whole if part == 1 else partial),
                whole if part == 0 else (partial if part == 1 else stop),
                k_strides, v_strides, T, begin, first_query, slope, relative, scale, cap, threshold, keep_scale,
                SIZE, WIDTH, BLOCK_M, BLOCK_N, SLOPES, BIAS, SOFTCAP, DROPOUT, DESCRIPTOR, part != 1, PRECISION,
            )  # fmt: skip
    store_tile(dq, acc * (scale * 0.6931471805599453), batch, head, begin, N, S, BLOCK_M, SIZE, WIDTH)
