"""What the three attention kernels share: tiles, the interval of places that each place sees, and scores.

A causal mask, a window and documents each let a query see an interval of keys, so all together do, and the same holds for
the queries that see a key. A kernel takes the intervals of its own BLOCK places and walks over three stretches of the other
side: blocks that some of its places see in part, blocks that all of them see whole (no mask is computed), and again blocks
seen in part. Blocks that none sees are never loaded.

Shapes: B batch, S queries, T keys, N heads, G key/value heads, D head size, padded to WIDTH inside.
"""

from __future__ import annotations

import triton
import triton.language as tl

MARGIN = tl.constexpr(128)  # kernels.tiles.MARGIN
NOWHERE = tl.constexpr(1 << 30)  # where an empty interval begins: beyond any place


@triton.jit
def load_tile(
    source,
    batch,
    head,
    start,
    strides,
    length,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    MASK: tl.constexpr,
):
    """(ROWS, WIDTH) of source, a pointer or a descriptor (B, heads, length, D); zeros beyond length (if MASK) and D.

    strides: of batch, head and row, in elements; D's is 1.
    """
    if DESCRIPTOR:
        tile = source.load([batch, head, start, 0]).reshape(ROWS, WIDTH)
    else:
        rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        first = source + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
        first += tl.cast(start, tl.int64) * strides[2]
        pointers = first + rows[:, None] * strides[2] + columns[None, :]
        if MASK and SIZE != WIDTH:
            tile = tl.load(pointers, mask=(rows[:, None] < length - start) & (columns[None, :] < SIZE), other=0.0)
        elif MASK:
            tile = tl.load(pointers, mask=rows[:, None] < length - start, other=0.0)
        elif SIZE != WIDTH:
            tile = tl.load(pointers, mask=columns[None, :] < SIZE, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    target, tile, batch, head, start, heads, length, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """tile (ROWS, WIDTH) into target, a pointer to a contiguous (B, length, heads, SIZE)."""
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    first = target + (tl.cast(batch, tl.int64) * length * heads + head) * SIZE
    pointers = first + rows[:, None].to(tl.int64) * (heads * SIZE) + columns[None, :]
    mask = (rows[:, None] < length) & (columns[None, :] < SIZE)
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=mask)


@triton.jit
def visible_keys(
    rows,
    batch,
    S,
    T,
    first_query,
    window,
    low,
    high,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """[first, last) of the keys that each of the query rows sees. low, high: pointers to (B, S) int32, if DOCUMENTS.

    A row beyond the last query has the last one's interval: it is not stored, and must not lengthen the walk.
    """
    rows = tl.minimum(rows, S - 1)
    places = rows + first_query
    first, last = tl.zeros_like(rows), tl.zeros_like(rows) + T
    if CAUSAL:
        last = tl.minimum(last, places + 1)
    if WINDOW:
        first = tl.maximum(first, places - window + 1)
        last = tl.minimum(last, places + window)
    if DOCUMENTS:
        rows += tl.cast(batch, tl.int64) * S
        first = tl.maximum(first, tl.load(low + rows))
        last = tl.minimum(last, tl.load(high + rows))
    return first, last


@triton.jit
def visible_queries(
    columns,
    batch,
    S,
    T,
    first_query,
    window,
    low,
    high,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """[first, last) of the query rows that see each of the keys. low, high: pointers to (B, T) int32, if DOCUMENTS."""
    columns = tl.minimum(columns, T - 1)
    own = columns - first_query  # the row that stands at the key's place
    first, last = tl.zeros_like(columns), tl.zeros_like(columns) + S
    if CAUSAL:
        first = tl.maximum(first, own)
    if WINDOW:
        first = tl.maximum(first, own - window + 1)
        last = tl.minimum(last, own + window)
    if DOCUMENTS:
        columns += tl.cast(batch, tl.int64) * T
        first = tl.maximum(first, tl.load(low + columns))
        last = tl.minimum(last, tl.load(high + columns))
    return first, last


@triton.jit
def stretches(first, last, BLOCK: tl.constexpr, HEAD: tl.constexpr):
    """Where the walk over blocks of BLOCK begins, begins and ceases to be seen whole, and ends, for all intervals.

    HEAD false: every interval begins at 0 and none is empty.
    """
    if HEAD:
        empty = first >= last
        first = tl.where(empty, NOWHERE, first)
        last = tl.where(empty, 0, last)
        stop = tl.max(last, 0)
        start = tl.min(first, 0) // BLOCK * BLOCK
        whole = tl.minimum(tl.cdiv(tl.max(first, 0), BLOCK) * BLOCK, stop)
        partial = tl.maximum(tl.min(last, 0) // BLOCK * BLOCK, whole)
    else:
        start, whole = 0, 0
        partial = tl.min(last, 0) // BLOCK * BLOCK
        stop = tl.max(last, 0)
    return start, whole, partial, stop


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))  # exp overflows to infinity, which gives 1


@triton.jit
def capped(product, scale, cap, SOFTCAP: tl.constexpr):
    """Scores of products of queries and keys, in base 2 as scale and cap are."""
    scores = product * scale
    if SOFTCAP:
        scores = cap * tanh(scores / cap)
    return scores


@triton.jit
def biases(bias, head, S):
    """A head's relative bias as `biased` takes it: a pointer to its number where column and row are the same, and the two
    distances between which there is more than one bucket.

    bias: pointer to numbers (N, S + T - 1) by distance, in base 2, with MARGIN zeros before and more behind, so that places
    beyond either end are in memory too; the elements from a head to the next; pointer to the two distances, int32.
    """
    zero = bias[0] + tl.cast(head, tl.int64) * bias[1] + (S - 1 + MARGIN)
    return zero, tl.load(bias[2]), tl.load(bias[2] + 1)


@triton.jit
def biased(scores, relative, rows, columns, begin, at, first_query, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """scores plus the bias of the tile of ROWS queries from `begin` and COLUMNS keys from `at` on; rows and columns: their
    places, to broadcast.

    Far from the diagonal a tile is all in the first or the last bucket: one number is read. Besides, Triton would copy a
    tile that is not read in a branch to shared memory, stages ahead, for which there is no room.
    """
    distance = at - begin - first_query
    if (distance + COLUMNS - 1 < relative[1]) | (distance - ROWS + 1 >= relative[2]):
        scores += tl.load(relative[0] + (at - begin))
    else:
        scores += tl.load(relative[0] + (columns - rows))
    return scores
