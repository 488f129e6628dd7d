"""Logical tensors: what a weight is before any layout cuts it.

A local parameter holds one or more *pieces*. A piece is a box of a logical tensor: rows `start : start + rows` of the
parameter (its first dimension) are the box `offset : offset + size` of the logical tensor `name`. Rows of the parameter
that belong to no piece are padding: zero at the start, never saved.

    qkv.weight (96, 64) at tp=2:   q: rows  0..32 -> q.weight[32:64, :]   k: rows 32..64 -> ...   v: rows 64..96 -> ...
    out.weight (64, 32) at tp=2:   out: rows 0..64 -> out.weight[:, 32:64]

Always: the boxes of all ranks of one tensor-parallel group tile the logical tensor exactly once, or are all the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn


class Initial(NamedTuple):
    """How a parameter begins: N(0, std^2) by `kernels.noise.normal`, or a constant."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


@dataclass(frozen=True)
class Piece:
    name: str  # the logical tensor's last name but one, "q" in "blocks.0.attention.q.weight"; "" keeps the module's own
    shape: tuple[int, ...]  # of the whole logical tensor
    offset: tuple[int, ...]  # where the box begins in the logical tensor
    size: tuple[int, ...]  # of the box
    start: int = 0  # the parameter's row where the box begins


def describe(
    parameter: nn.Parameter, initial: Initial, pieces: tuple[Piece, ...] | None = None, decay: bool = True
) -> nn.Parameter:
    """Attach what the engine, the initialisation and the checkpoint must know of a parameter; returns it."""
    whole = tuple(parameter.shape)
    parameter.local_shape = whole  # type: ignore[attr-defined]  # its own shape is empty while ZeRO-3 has it shared out
    parameter.pieces = pieces or (Piece("", whole, (0,) * len(whole), whole),)  # type: ignore[attr-defined]
    parameter.initial = initial  # type: ignore[attr-defined]
    parameter.decay = decay  # type: ignore[attr-defined]  # weight decay applies
    return parameter


def canonical(path: str, piece: Piece) -> str:
    """`blocks.0.attention.qkv.weight` and the piece `q` -> `blocks.0.attention.q.weight`."""
    if not piece.name:
        return path
    *parents, _, leaf = path.split(".")
    return ".".join([*parents, piece.name, leaf])


def logical_tensors(module: nn.Module) -> list[tuple[str, Piece, nn.Parameter]]:
    """Every (canonical name, piece, parameter) that this process holds, in the module's order."""
    return [
        (canonical(path, piece), piece, parameter)
        for path, parameter in module.named_parameters()
        for piece in parameter.pieces  # type: ignore[attr-defined]
    ]


def view(parameter: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The rows of a local tensor shaped like the parameter that the piece is about."""
    return parameter[piece.start : piece.start + piece.size[0]]
