"""Tensors of ours joined into one of theirs, and taken out of it again; the two are inverse, bit by bit.

Legend: N heads, D head size, H hidden. Each tensor of ours is (out, in), or (out,) for a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.huggingface.rows import Row

Shape = tuple[int, ...]


def joined_shape(row: Row, shapes: list[Shape]) -> Shape:
    """Of their tensor, from ours."""
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return whole[::-1] if row.form == "turned" else whole


def join(row: Row, tensors: list[Tensor], num_heads: int) -> Tensor:
    """Their tensor."""
    if row.form == "by head":
        heads = [tensor.unflatten(0, (num_heads, -1)) for tensor in tensors]  # (N, D, ...) each
        return torch.stack(heads, dim=1).flatten(0, 2)  # (N, 3, D, ...) -> (3 N D, ...)
    whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return whole.t() if row.form == "turned" else whole


def take(row: Row, name: str, whole: Tensor, shapes: list[Shape], num_heads: int) -> Tensor:
    """Our tensor `name` out of theirs. shapes: of ours, in the row's order."""
    place = row.ours.index(name)
    if row.form == "by head":
        heads = whole.unflatten(0, (num_heads, len(shapes), -1))  # (N, 3, D, ...)
        return heads[:, place].flatten(0, 1)
    rows = [shape[0] for shape in shapes]
    return (whole.t() if row.form == "turned" else whole).split(rows)[place]
