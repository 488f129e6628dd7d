"""Initial weights: each element a function of (seed, its logical tensor's name, its place in the logical tensor).

So any share of any tensor can be made alone, and every layout starts from the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import noise
from parallel.logical import Initial, Piece, canonical, view


def initial_values(path: str, parameter: nn.Parameter, seed: int) -> Tensor:
    """float32 values of a local parameter, shaped like it; padding rows are zero."""
    values = torch.zeros(parameter.local_shape, dtype=torch.float32)  # type: ignore[attr-defined]
    initial: Initial = parameter.initial  # type: ignore[attr-defined]
    for piece in parameter.pieces:  # type: ignore[attr-defined]
        view(values, piece).copy_(_box(canonical(path, piece), piece, initial, seed))
    return values


def _box(name: str, piece: Piece, initial: Initial, seed: int) -> Tensor:
    if initial.kind == "zeros":
        return torch.zeros(piece.size)
    if initial.kind == "ones":
        return torch.ones(piece.size)
    return noise.normal(noise.key(seed, "weight", name), piece.shape, piece.offset, piece.size) * initial.std


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill every parameter of a module."""
    for path, parameter in module.named_parameters():
        parameter.copy_(initial_values(path, parameter, seed))
