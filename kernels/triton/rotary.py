"""Rotary positions of queries and keys in one launch: a program for each token turns all of its heads.

Feature i of a head turns with feature i + D/2; the arithmetic is float32. The backward pass is the same turn the other way.

Shapes: B batch, S sequence, N query heads, G key heads, D head size, P rows of the tables of angles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _turn(line, into, heads, stride, cos, sin, HALF: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """One token's heads (heads, D), `stride` from head to head, into (heads, D) without gaps; cos and sin (COLUMNS,)."""
    columns = tl.arange(0, COLUMNS)[None, :]
    for first in tl.range(0, heads, HEADS):
        numbers = first + tl.arange(0, HEADS)[:, None]
        mask = (numbers < heads) & (columns < HALF)
        here = line + numbers.to(tl.int64) * stride + columns
        low = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(here + HALF, mask=mask, other=0.0).to(tl.float32)
        there = into + numbers * (2 * HALF) + columns
        tl.store(there, (low * cos - high * sin).to(into.dtype.element_ty), mask=mask)
        tl.store(there + HALF, (high * cos + low * sin).to(into.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "heads", "groups"])
def rotary_kernel(
    q, k, cos, sin, positions, q_out, k_out, length, heads, groups,
    q_batch, q_place, q_head, k_batch, k_place, k_head,
    PLACED: tl.constexpr, INVERSE: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """q (B, S, N, D) and k (B, S, G, D) with their strides, cos and sin (P, D/2) float32; positions (B, S) int64 or int32,
    rows of the tables where PLACED, else a token's place in its sequence -> q_out and k_out without gaps.

    HALF: D/2; HEADS, COLUMNS: of a tile, of q's and of k's heads alike: fewer heads of k would move in narrower accesses."""
    token = tl.program_id(0)
    batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    row = place
    if PLACED:
        row = tl.load(positions + token).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    c = tl.load(cos + row * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
    s = tl.load(sin + row * HALF + columns, mask=columns < HALF, other=0.0)[None, :]
    if INVERSE:
        s = -s
    into = token.to(tl.int64) * (2 * HALF)
    _turn(q + batch * q_batch + place * q_place, q_out + into * heads, heads, q_head, c, s, HALF, HEADS, COLUMNS)
    _turn(k + batch * k_batch + place * k_place, k_out + into * groups, groups, k_head, c, s, HALF, HEADS, COLUMNS)
