"""Tensors of ours joined into one of theirs, and taken out of it again; the two are inverse, bit by bit. And those of theirs
that none of ours makes.

Legend: N heads, D head size, H hidden, S positions, V vocabulary. Each tensor of ours is (out, in), or (out,) for a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.huggingface.architecture import Settings
from pretrain.huggingface.rows import Fixed, Row
from pretrain.models.blocks import sinusoids

Shape = tuple[int, ...]


def joined_shape(row: Row, shapes: list[Shape]) -> Shape:
    """Of their tensor, from ours."""
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return whole[::-1] if row.form == "turned" else whole


def join(row: Row, tensors: list[Tensor], num_heads: int) -> Tensor:
    """Their tensor."""
    tensors = [_even_first(tensor, row.even_first) for tensor in tensors]
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
        return _alternating(heads[:, place].flatten(0, 1), row.even_first)
    rows = [shape[0] for shape in shapes]
    return _alternating((whole.t() if row.form == "turned" else whole).split(rows)[place], row.even_first)


def _even_first(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """With the even places of these dimensions before the odd ones."""
    for dim in dims:
        if dim < tensor.dim():
            tensor = tensor.index_select(dim, _places(tensor.shape[dim]))
    return tensor


def _alternating(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The inverse."""
    for dim in dims:
        if dim < tensor.dim():
            tensor = tensor.index_select(dim, _places(tensor.shape[dim]).argsort())
    return tensor


def _places(count: int) -> Tensor:
    """0, 2, 4, ..., 1, 3, 5, ..."""
    return torch.cat((torch.arange(0, count, 2), torch.arange(1, count, 2)))


def fixed_shape(fixed: Fixed, ours: Settings) -> Shape:
    if fixed.values == "no bias":
        return (1, ours["vocab_size"])
    return (ours["max_positions"], ours["hidden_size"])


def fixed_values(fixed: Fixed, ours: Settings) -> Tensor:
    """Of the shape above, float32."""
    shape = fixed_shape(fixed, ours)
    return torch.zeros(shape) if fixed.values == "no bias" else _even_first(sinusoids(*shape), (1,))
