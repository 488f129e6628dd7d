"""Checkpoints, found and loaded: logical tensors and the few numbers that a run needs to go on, without a trace of the
layout that wrote them.

    RUN/checkpoints/step-00000500/
        manifest.json                what lies where, SHA-256 of each file, the state
        rank-00000-000.safetensors   rank 0's boxes of weights (float32 masters) and moments, a gigabyte a file

A folder of that name is whole (`pretrain.saving`). One that was damaged since is passed over with a warning that names it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.boxes import local_boxes, row_length, wanted_rows
from parallel.engine import MOMENTS, Engine
from parallel.grid import Grid
from parallel.logical import Piece
from pretrain.config.folder import CHECKPOINTS
from pretrain.errors import UserError
from pretrain.opening import Checkpoint, State, folder_of, open_checkpoint
from pretrain.storage import Wanted, read_boxes, tensor_name

__all__ = ["Checkpoint", "State", "folder_of", "open_checkpoint"]

_NAME = re.compile(r"step-(\d{8})")
MOMENT_PREFIXES = tuple(tensor_name("", kind) for kind in MOMENTS)

log = logging.getLogger(__name__)


# -- finding -------------------------------------------------------------------------------------------------------


def list_steps(run: Path) -> list[int]:
    """Steps of the checkpoints in place, oldest first."""
    folder = run / CHECKPOINTS
    names = (_NAME.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(int(match.group(1)) for match in names if match)


def latest(
    run: Path,
    warn: Callable[[str], None] = log.warning,
    grid: Grid | None = None,
    wanted: Callable[[State], bool] = lambda _: True,
) -> Checkpoint | None:
    """The newest checkpoint that is whole, of a state that is wanted; damaged ones are passed over with a warning. With a grid
    it is the same on every rank, which each hash a part of the files. Collective then; raises UserError where there are only
    damaged ones."""
    steps = list_steps(run)
    damaged = 0
    for step in reversed(steps if grid is None else grid.from_first(steps)):
        folder = folder_of(run, step)
        try:
            found = open_checkpoint(folder) if grid is None else _open_together(folder, grid)
            if wanted(found.state):
                return found
        except UserError as error:
            damaged += 1
            warn(f"passing over a damaged checkpoint: {error}")
    if damaged and damaged == len(steps):
        raise UserError(
            f"{run}: all {damaged} checkpoints are damaged, nothing can be resumed; "
            "remove the run's folder to start anew, or put back a copy"
        )
    return None


def _open_together(folder: Path, grid: Grid) -> Checkpoint:
    found: Any = None
    if grid.rank == 0:
        found = _caught(lambda: open_checkpoint(folder, verify=False))
    found = grid.from_first(found)
    if isinstance(found, UserError):
        raise found
    _raise_together(_caught(lambda: found.verify(grid.rank, grid.world)), grid)
    return found


def _caught(action: Callable[[], Any]) -> Any:
    """What it returns, or the UserError that it raises."""
    try:
        return action()
    except UserError as error:
        return error


def _raise_together(outcome: UserError | None, grid: Grid) -> None:
    """Raise on every rank what some have met."""
    for error in grid.from_all(outcome):
        if error is not None:
            raise error


# -- loading -------------------------------------------------------------------------------------------------------


def load_engine(checkpoint: Checkpoint, engine: Engine, grid: Grid) -> None:
    """Weights and moments into the engine's shares, whatever layout wrote them. Each rank reads what it needs.
    Collective; raises UserError on every rank where some cannot read."""
    shares = list(engine.shares())
    wanted, copies = [], []
    for share in shares:
        first, end = wanted_rows(share)
        for kind, flat in {"weight": share.master, **share.moments}.items():
            shape = (end - first, *share.parameter.local_shape[1:])  # type: ignore[attr-defined]
            rows = torch.zeros(shape, dtype=torch.float32)
            wanted += _wanted(share.path, share.parameter, first, end, kind, rows)
            copies.append((share, first, flat, rows))
    _raise_together(_caught(lambda: _read(checkpoint, wanted)), grid)
    with torch.no_grad():
        for share, first, flat, rows in copies:
            begin = share.start - first * row_length(share.parameter)
            flat.copy_(rows.flatten()[begin : begin + share.numel])
    engine.updates = checkpoint.state.updates
    engine.publish()


def load_weights(checkpoint: Checkpoint, module: nn.Module, beside: tuple[str, ...] = ()) -> None:
    """Weights alone into a whole model, for generation and evaluation. beside: beginnings of the names of those that the
    checkpoint may have beyond the model's."""
    wanted, copies = [], []
    for path, parameter in module.named_parameters():
        values = torch.zeros(parameter.shape, dtype=torch.float32)
        wanted += _wanted(path, parameter, 0, parameter.shape[0], "weight", values)
        copies.append((parameter, values))
    held = {name for name in weight_shapes(checkpoint) if not name.startswith(beside)}
    beyond = sorted(held - {want.tensor for want in wanted})
    if beyond:
        raise UserError(f"{checkpoint.folder}: of another model; this one has no {beyond[0]!r:.80}")
    _read(checkpoint, wanted)
    with torch.no_grad():
        for parameter, values in copies:
            parameter.copy_(values)


def weight_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of the model's logical tensors, without the moments."""
    return {entry.tensor: entry.shape for entry in checkpoint.entries if not entry.tensor.startswith(MOMENT_PREFIXES)}


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """One logical tensor, whole. Raises UserError."""
    shape = weight_shapes(checkpoint)[name]
    values = torch.zeros(shape, dtype=torch.float32)
    _read(checkpoint, [Wanted(name, shape, (0,) * len(shape), values)])
    return values


def read_box(checkpoint: Checkpoint, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """float32 box of one logical tensor. Raises UserError."""
    values = torch.zeros(size, dtype=torch.float32)
    _read(checkpoint, [Wanted(name, weight_shapes(checkpoint)[name], offset, values)])
    return values


def _wanted(path: str, parameter: nn.Parameter, first: int, end: int, kind: str, rows: Tensor) -> list[Wanted]:
    return [
        Wanted(tensor_name(name, kind), piece.shape, _offset(piece, begin), rows[begin - first : stop - first])
        for name, piece, begin, stop in local_boxes(path, parameter, first, end)
    ]


def _offset(piece: Piece, row: int) -> tuple[int, ...]:
    return (piece.offset[0] + row - piece.start, *piece.offset[1:])


def _read(checkpoint: Checkpoint, wanted: list[Wanted]) -> None:
    shapes = {entry.tensor: entry.shape for entry in checkpoint.entries}
    missing = sorted({want.tensor for want in wanted} - shapes.keys())
    if missing:
        raise UserError(f"{checkpoint.folder}: lacks {len(missing)} tensors of this model, the first {missing[0]!r}")
    for want in wanted:
        if shapes[want.tensor] != want.shape:
            found = f"{want.tensor!r} is {shapes[want.tensor]}, this model's {want.shape}"
            raise UserError(f"{checkpoint.folder}: of another model; its {found}")
    try:
        read_boxes(wanted, checkpoint.folder, checkpoint.entries)
    except OSError as error:
        raise UserError(f"{checkpoint.folder}: cannot be read: {error}") from error
    for want in wanted:
        if not want.target.isfinite().all():
            raise UserError(
                f"{checkpoint.folder}: its {want.tensor!r:.80} has numbers that are not finite (NaN or infinity), which no "
                "training mends; take an earlier checkpoint, or make or export this one again"
            )
