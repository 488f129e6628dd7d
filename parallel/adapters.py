"""LoRA (Hu et al. 2021, section 4.1): beside the product with a weight W that does not learn one with two thin factors that
do, W x + s B A x. A begins at random and B at zero, so that the model begins as it was.

The factors of a logical tensor `...q.weight` (out, in) are the logical tensors `...q.lora_a` (rank, in) and `...q.lora_b`
(out, rank). Under tensor parallelism they are cut as W is, and what the cut leaves whole each tensor rank has:

    column-parallel   W rows     A whole     B rows       A sees gradients of this rank's rows alone: they are summed
    row-parallel      W columns  A columns   B whole      B sees this rank's part of A x alone: likewise

so that no product needs a collective beyond W's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.noise import dropout
from parallel.axes import ContextAxis, TensorAxis, mark_cut, mark_partial
from parallel.logical import Initial, Piece, describe

FACTORS = (".lora_a", ".lora_b")  # how their names end


class LoRA(NamedTuple):
    """targets: names of the logical tensors that have factors; scale: s; dropout: rate before A, while training; site: of
    its masks (`kernels.noise`)."""

    targets: tuple[str, ...]
    rank: int
    scale: float
    dropout: float = 0.0
    site: int = 0


Factors = tuple[nn.Parameter, nn.Parameter]


def column_factors(axis: TensorAxis, in_features: int, outputs: dict[str, int], lora: LoRA) -> Factors:
    """Of a column-parallel product, see `parallel.layers.Parts.column`: the targets' A one below the other, and their B."""
    rank, start = lora.rank, 0
    firsts: list[Piece] = []
    seconds: list[Piece] = []
    for name in (name for name in outputs if name in lora.targets):
        local = outputs[name] // axis.size
        firsts.append(Piece(name, (rank, in_features), (0, 0), (rank, in_features), len(firsts) * rank))
        seconds.append(Piece(name, (outputs[name], rank), (local * axis.rank, 0), (local, rank), start))
        start += local
    first = _normal(len(firsts) * rank, in_features, in_features, tuple(firsts))
    second = describe(nn.Parameter(torch.empty(start, rank)), Initial("zeros"), tuple(seconds))
    mark_cut(second, axis, 0)
    return mark_partial(first, axis), second


def row_factors(axis: TensorAxis, in_features: int, out_features: int, lora: LoRA) -> Factors:
    """Of a row-parallel product."""
    rank, local = lora.rank, in_features // axis.size
    piece = Piece("", (rank, in_features), (0, local * axis.rank), (rank, local))
    first = _normal(rank, local, in_features, (piece,))
    mark_cut(first, axis, 1)
    second = describe(nn.Parameter(torch.empty(out_features, rank)), Initial("zeros"))
    return first, mark_partial(second, axis)


def _normal(rows: int, columns: int, in_features: int, pieces: tuple[Piece, ...]) -> nn.Parameter:
    """A, as wide as the authors' code draws it: 1 / sqrt(3 in)."""
    return describe(nn.Parameter(torch.empty(rows, columns)), Initial("normal", (3 * in_features) ** -0.5), pieces)


def dropped(x: Tensor, lora: LoRA, keys: Tensor | None, context: ContextAxis, first_column: int = 0) -> Tensor:
    """What meets A of an input (B, S, in), in the coordinates of the whole one. keys (B,): of the samples."""
    if lora.dropout == 0.0:
        return x
    if keys is None:
        raise ValueError("LoRA's dropout needs the sample keys of the batch: pass them, or call eval()")
    return dropout(x, lora.dropout, keys, lora.site, x.shape[1] * context.rank, first_column)
