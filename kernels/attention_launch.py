"""Launches of the attention kernels: grid, tile and variant, from shapes, types and alignment alone. Imports triton."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import tiles
from kernels.attention_triton import Options, capability
from kernels.documents import Bounds
from kernels.noise import _i32
from kernels.relative import by_distance
from kernels.triton import attention_backward, attention_bias, attention_forward

LOG2_E = math.log2(math.e)
FIRST_WITH_DESCRIPTORS = 90
LARGEST_ROW = 1 << 22  # elements from a row to the next: a tile's own offsets are 32 bits, all others 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    bias: Tensor | None,
    edges: Tensor | None,
    keys: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """out (B, S, N, D) and lse (B, N, S): see `kernels.attention_triton`."""
    (batch, length, heads, size), (_, total, groups, _) = q.shape, k.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    if out.numel() == 0 or total == 0:
        return out.zero_(), lse.fill_(-math.inf)
    q, k, v = aligned(q), aligned(k), aligned(v)
    tile = tiles.tile("forward", capability(q), size, q.dtype, bias is not None)
    flags = variant(q, options, slopes, bias, low is not None)
    rows, columns = (sides(flags, tile.rows, q), sides(flags, tile.columns, k, v))
    attention_forward.forward_kernel[triton.cdiv(length, tile.rows), heads, batch](
        *rows, *columns, out, lse, slopes, relative_bias(bias, edges, options, length, total),
        keys, low, high, strides(q), strides(k), strides(v),
        length, total, heads, heads // groups, *scalars(options),
        **walk_over_keys(options, flags, tile, total), **flags, **launched(tile),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slopes: Tensor | None,
    bias: Tensor | None,
    edges: Tensor | None,
    keys: Tensor | None,
    seen: Bounds | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and bias, contiguous; of no bias (0, 0)."""
    (batch, length, heads, size), (_, total, groups, _) = q.shape, k.shape
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    table = q.new_zeros(0, 0) if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), table
    grad, q, k, v = aligned(grad), aligned(q), aligned(k), aligned(v)
    flags = variant(q, options, slopes, bias, seen is not None)
    relative = relative_bias(bias, edges, options, length, total)
    delta = torch.empty_like(lse)
    rows = tiles.DELTA_ROWS
    attention_backward.delta_kernel[triton.cdiv(length, rows), heads, batch](
        out.contiguous(), grad, delta, strides(grad), length, heads,
        SIZE=size, WIDTH=flags["WIDTH"], BLOCK_M=rows, enable_fp_fusion=True,
    )  # fmt: skip
    shared = (strides(q), strides(k), strides(v), strides(grad), length, total, heads, heads // groups)

    tile = tiles.tile("key", capability(q), size, q.dtype, bias is not None)
    tall, wide = sides(flags, tile.rows, q, grad), sides(flags, tile.columns, k, v)
    bounds = (None, None) if seen is None else (seen.query_low, seen.query_high)
    for wanted in tiles.passes(capability(q), size):
        attention_backward.key_kernel[triton.cdiv(total, tile.columns), groups, batch](
            tall[0], *wide, tall[1], lse, delta, dk, dv, slopes, relative, keys, *bounds, *shared, *scalars(options),
            **walk_over_queries(options, flags, tile, length), **flags, **wanted, **launched(tile),
        )  # fmt: skip

    tile = tiles.tile("query", capability(q), size, q.dtype, bias is not None)
    tall, wide = sides(flags, tile.rows, q, grad), sides(flags, tile.columns, k, v)
    bounds = (None, None) if seen is None else (seen.key_low, seen.key_high)
    attention_backward.query_kernel[triton.cdiv(length, tile.rows), heads, batch](
        tall[0], *wide, tall[1], lse, delta, dq, slopes, relative, keys, *bounds, *shared, *scalars(options),
        **walk_over_keys(options, flags, tile, total), **flags, **launched(tile),
    )  # fmt: skip

    if bias is not None and edges is not None:
        table = bias_gradient(q, k, v, grad, lse, delta, bias, edges, relative, keys, bounds, shared, flags, options)
    return dq, dk, dv, table


def bias_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    bias: Tensor,
    edges: Tensor,
    relative: tuple[Tensor, int, Tensor] | None,
    keys: Tensor | None,
    bounds: tuple[Tensor | None, Tensor | None],
    shared: tuple[Any, ...],
    flags: dict[str, Any],
    options: Options,
) -> Tensor:
    """The gradient of bias (N, I), from what the other kernels of the backward were launched with."""
    tile = tiles.tile("bias", capability(q), q.shape[3], q.dtype, biased=True)
    tall, wide = sides(flags, tile.rows, q, grad), sides(flags, tile.columns, k, v)
    lowest, count = diagonals(options, tile.rows, q.shape[1], k.shape[1])
    limits = bucket_limits(edges)
    sums = lse.new_zeros((count, q.shape[0], q.shape[2], len(limits)))
    if count:
        attention_bias.bias_kernel[count, q.shape[2], q.shape[0]](
            tall[0], *wide, tall[1], lse, delta, sums, limits, relative, keys, *bounds, *shared, lowest,
            *scalars(options), BLOCK_M=tile.rows, BLOCK_N=tile.columns, BUCKETS=len(limits),
            **{name: flags[name] for name in flags if name not in ("SLOPES", "BIAS")}, **launched(tile),
        )  # fmt: skip
    return sums.sum((0, 1))[:, : bias.shape[1]].to(bias.dtype)


def diagonals(options: Options, side: int, length: int, total: int) -> tuple[int, int]:
    """Which diagonals of tiles hold a pair that sees each other, causality and window alone: the lowest, and how many.

    A diagonal's number d is its tiles' key block less their query block; it has the distances within side - 1 of
    d * side - first_query.
    """
    first, last = 1 - triton.cdiv(length, side), triton.cdiv(total, side) - 1
    nearest, farthest = -(length + options.first_query), total
    if options.causal:
        farthest = 0
    if options.window:
        nearest, farthest = 1 - options.window, min(farthest, options.window - 1)
    first = max(first, -(-(nearest + options.first_query - side + 1) // side))
    last = min(last, (farthest + options.first_query + side - 1) // side)
    return first, max(last - first + 1, 0)


def bucket_limits(edges: Tensor) -> Tensor:
    """(a power of two above I,) int32: the lowest integer, edges (I - 1,), and the largest integer from there on."""
    width = triton.next_power_of_2(len(edges) + 2)
    begins = F.pad(edges, (1, 0), value=-(2**31))
    return F.pad(begins, (0, width - len(begins)), value=2**31 - 1)


def relative_bias(
    bias: Tensor | None, edges: Tensor | None, options: Options, length: int, total: int
) -> tuple[Tensor, int, Tensor] | None:
    """What `kernels.triton.attention.biases` takes."""
    if bias is None or edges is None:
        return None
    values = by_distance(bias.float() * LOG2_E, edges, 1 - options.first_query - length, length + total - 1)
    width = -(-(values.shape[1] + 2 * tiles.MARGIN) // 16) * 16  # a multiple, so that all lengths are one variant
    limits = bucket_limits(edges)
    ends = torch.stack((limits[1], limits[len(edges)]))
    return F.pad(values, (tiles.MARGIN, width - values.shape[1] - tiles.MARGIN)), width, ends


def variant(q: Tensor, options: Options, slopes: Tensor | None, bias: Tensor | None, documents: bool) -> dict[str, Any]:
    """The compile-time arguments that do not depend on a tile."""
    return {
        "SIZE": q.shape[3],
        "WIDTH": tiles.padded(q.shape[3]),
        "CAUSAL": options.causal,
        "WINDOW": options.window > 0,
        "DOCUMENTS": documents,
        "SLOPES": slopes is not None,
        "BIAS": bias is not None,
        "SOFTCAP": options.softcap > 0,
        "DROPOUT": options.dropout > 0,
        "DESCRIPTOR": capability(q) >= FIRST_WITH_DESCRIPTORS and q.dtype.itemsize == 2,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",  # of float32 products alone
    }


def walk_over_keys(options: Options, flags: dict[str, Any], tile: tiles.Tile, total: int) -> dict[str, Any]:
    """Tile sizes, and whether a walk over keys meets blocks seen in part before and after those seen whole."""
    head = flags["WINDOW"] or flags["DOCUMENTS"]
    tail = head or options.causal or total % tile.columns > 0
    return {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "HEAD": head, "TAIL": tail}


def walk_over_queries(options: Options, flags: dict[str, Any], tile: tiles.Tile, length: int) -> dict[str, Any]:
    limited = flags["WINDOW"] or flags["DOCUMENTS"]
    head, tail = limited or options.causal, limited or length % tile.rows > 0
    return {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "HEAD": head, "TAIL": tail}


def launched(tile: tiles.Tile) -> dict[str, Any]:
    # Contraction to fused multiply-adds is off by default from Triton 3.10 on.
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def scalars(options: Options) -> tuple[int | float, ...]:
    """first_query, window, first_head, site, threshold, keep_scale, scale, cap: in base 2 the last two."""
    return (
        options.first_query,
        options.window,
        options.first_head,
        _i32(options.site * 0x9E3779B9),
        math.floor(options.dropout * 2**32) - 2**31,
        1.0 / (1.0 - options.dropout),
        options.scale * LOG2_E,
        options.softcap * LOG2_E,
    )


def aligned(x: Tensor) -> Tensor:
    """x (B, S, N, D), or a copy if its rows do not begin at 16-byte steps, as descriptors and wide loads want them.

    Views of a packed qkv do; a broadcast gradient, a transposed view or a head size of 20 pays the copy.
    """
    row = x.stride(1)
    steps_fit = all(step > 0 and step * x.element_size() % 16 == 0 for step in strides(x))
    if x.stride(3) == 1 and x.data_ptr() % 16 == 0 and steps_fit and row <= LARGEST_ROW:
        return x
    whole = 16 // x.element_size()
    wide = x.new_empty(*x.shape[:3], -(-x.shape[3] // whole) * whole)
    return wide[..., : x.shape[3]].copy_(x)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of x (B, S, N, D): batch, head, row."""
    return x.stride(0), x.stride(2), x.stride(1)


def sides(flags: dict[str, Any], rows: int, *tensors: Tensor) -> list[Any]:
    """tensors (B, S, N, D) as a kernel loads tiles of `rows` from them: descriptors of (B, N, S, D), or as they are."""
    if not flags["DESCRIPTOR"]:
        return list(tensors)
    block = [1, 1, rows, flags["WIDTH"]]
    return [
        TensorDescriptor(x, [x.shape[0], x.shape[2], x.shape[1], x.shape[3]], [*strides(x), 1], block) for x in tensors
    ]
