"""Biases of attention's scores by the distance from query to key, in buckets (Raffel et al. 2020, "T5", section 2.1).

A distance is the key's place less the query's, signed. A bucket is an interval of distances, so I buckets are I - 1 ascending
edges: bucket i has edges[i - 1] <= distance < edges[i], without a limit at either end. A head has one number a bucket.

Shapes: N heads, I buckets, S queries, T keys; their S + T - 1 distances.
Always: every sum of a gradient has one order, so that a resumed run is bitwise. That is why nothing here indexes a table:
the gradient of an indexed tensor is added up by racing threads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def t5_buckets(num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> tuple[Tensor, Tensor]:
    """edges (I - 1,) int32 of T5's buckets, and order (I,): bucket i's bias is row order[i] of T5's table.

    num_buckets is the number of the table's rows. In both directions one of them, row num_buckets // 2, is of no distance,
    so I = num_buckets - 1 (for an even number); to the left alone I = num_buckets, and all keys to the right are in row 0.
    The distances where a bucket ends are found with T5's own float32 formula, whose rounding decides some of them.
    """
    count = num_buckets // 2 if bidirectional else num_buckets  # rows of one direction
    exact = count // 2  # the first ones have one distance each, the others grow with its logarithm
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"T5's buckets need num_buckets of at least {4 if bidirectional else 2} and a max_distance above "
            f"{max(exact, 1)}, found {num_buckets} and {max_distance}"
        )
    away = torch.arange(max_distance + 1)
    grown = torch.log(away.float() / exact) / math.log(max_distance / exact) * (count - exact)
    large = (exact + grown.clamp(min=0).long()).clamp(max=count - 1)
    rows = torch.where(away < exact, away, large)
    right = rows[1:] + count if bidirectional else torch.zeros(1, dtype=torch.int64)
    whole = torch.cat((rows.flip(0), right))
    changes = (whole[1:] != whole[:-1]).nonzero()[:, 0] + 1
    edges = changes.to(torch.int32) - max_distance
    return edges, whole[torch.cat((torch.zeros(1, dtype=torch.int64), changes))]


def wrong_bias(bias: Tensor | None, edges: Tensor | None, slopes: Tensor | None, heads: int) -> str:
    """What is wrong with these arguments of attention over N heads: one phrase, "" if nothing is."""
    if bias is None and edges is None:
        return ""
    if bias is None or edges is None:
        return "a relative bias needs both `bias` (N, I) and `edges` (I - 1,)"
    if slopes is not None:
        return "scores take a relative `bias` or linear `slopes`, not both"
    if bias.dim() != 2 or bias.shape[0] != heads or tuple(edges.shape) != (bias.shape[1] - 1,):
        found = f"{tuple(bias.shape)} and {tuple(edges.shape)}"
        return f"`bias` (N, I) and `edges` (I - 1,) for N = {heads} heads are needed, found {found}"
    if edges.dtype != torch.int32:
        return f"`edges` are int32, found {edges.dtype}"
    return ""


def by_distance(bias: Tensor, edges: Tensor, first: int, count: int) -> Tensor:
    """The bias (N, count) of the distances first, first + 1, ... from bias (N, I) and edges (I - 1,) int32."""
    distances = torch.arange(first, first + count, device=bias.device, dtype=torch.int32)
    buckets = torch.bucketize(distances, edges, out_int32=True, right=True)
    own = buckets == torch.arange(bias.shape[1], device=bias.device, dtype=torch.int32)[:, None]  # (I, count)
    return torch.where(own, bias[:, :, None], 0.0).sum(1)


def by_place(values: Tensor, queries: int) -> Tensor:
    """(N, S, T) of values (N, S + T - 1) by distance: entry i, j is values[j - i + S - 1]. queries: S."""
    return _ByPlace.apply(values, queries)


class _ByPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, queries: int) -> Tensor:
        keys = values.shape[1] - queries + 1
        return values.unfold(1, keys, 1).flip(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The sums over diagonals: rows of S + T numbers, read as rows of one less, are each shifted by their number."""
        heads, queries, keys = grad.shape
        wide = F.pad(grad.flip(1), (0, queries)).reshape(heads, queries * (queries + keys))
        shifted = wide[:, : queries * (queries + keys - 1)].view(heads, queries, queries + keys - 1)
        return shifted.sum(1), None
