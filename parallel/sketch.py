"""Fingerprints of tensors that can be subtracted: whether two layouts hold the same numbers, without gathering any.

A count sketch (Charikar, Chen and Farach-Colton 2002) sends each element, with a sign, to one of BUCKETS sums; bucket and
sign are a hash of the logical tensor's name and the element's place in it. It is linear, so ranks' sketches of their shares
add up to the whole tensor's whatever the layout, and the norm of a difference of sketches is that of the difference of
tensors, within sqrt(2 / BUCKETS) (4%).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import noise
from parallel.engine import Engine, Share
from parallel.gradients import counts_once
from parallel.grid import Grid
from parallel.logical import Piece, canonical

Sketch = np.ndarray[Any, np.dtype[np.float64]]

BUCKETS = 1024
CHUNK = 1 << 22  # elements hashed at a time


@torch.no_grad()
def sketches(engine: Engine, grid: Grid, kind: str) -> dict[str, Sketch]:
    """(BUCKETS,) float64 of every logical tensor that has it, the same on every rank; kind: "weight" or a moment.
    Collective."""
    found: dict[str, Tensor] = {}
    for share in engine.shares():
        ours = counts_once(share.parameter, grid.tensor.rank) and (not share.replicated or grid.replica_rank == 0)
        values = share.master if kind == "weight" else share.moments.get(kind)
        if values is None:
            continue
        for name, piece, first, last in intervals(share):
            total = found.setdefault(name, torch.zeros(BUCKETS, dtype=torch.float64, device=values.device))
            if ours:
                _add(total, values, share, piece, name, first, last)
    names = sorted(set().union(*_everywhere(list(found), grid)))
    if not names:
        return {}
    none = torch.zeros(BUCKETS, dtype=torch.float64, device=grid.device)
    sums = grid.total(torch.stack([found.get(name, none).to(grid.device) for name in names]))
    return dict(zip(names, sums.cpu().numpy(), strict=True))


def logical_sizes(engine: Engine, grid: Grid) -> dict[str, int]:
    """Elements of every logical tensor, the same on every rank. Collective."""
    ours = {
        canonical(share.path, piece): math.prod(piece.shape)
        for share in engine.shares()
        for piece in share.parameter.pieces  # type: ignore[attr-defined]
    }
    return {name: size for part in _everywhere(ours, grid) for name, size in part.items()}


def _everywhere(value: Any, grid: Grid) -> list[Any]:
    values: list[Any] = [value] * grid.world
    if grid.world > 1:
        dist.all_gather_object(values, value)
    return values


def intervals(share: Share) -> Iterator[tuple[str, Piece, int, int]]:
    """(canonical name, piece, first, past the last) of the flattened local parameter's elements that the share has."""
    length = math.prod(share.parameter.local_shape[1:])  # type: ignore[attr-defined]
    for piece in share.parameter.pieces:  # type: ignore[attr-defined]
        first = max(share.start, piece.start * length)
        last = min(share.start + share.numel, (piece.start + piece.size[0]) * length)
        if first < last:
            yield canonical(share.path, piece), piece, first, last


def _add(total: Tensor, values: Tensor, share: Share, piece: Piece, name: str, first: int, last: int) -> None:
    """Add the elements first : last of the flattened local parameter to a sketch."""
    length = math.prod(share.parameter.local_shape[1:])  # type: ignore[attr-defined]
    columns_from = piece.offset[1] if len(piece.offset) > 1 else 0
    purpose = noise.key("sketch", name)
    for begin in range(first, last, CHUNK):
        end = min(begin + CHUNK, last)
        places = torch.arange(begin, end, device=values.device)
        rows = (places // length - piece.start + piece.offset[0]).to(torch.int32)
        columns = (places % length + columns_from).to(torch.int32)
        codes = noise.mix(noise.mix(rows ^ purpose) ^ columns)
        signs = 1.0 - 2.0 * ((codes >> 20) & 1).to(torch.float64)
        total.index_add_(0, codes & (BUCKETS - 1), values[begin - share.start : end - share.start].double() * signs)
