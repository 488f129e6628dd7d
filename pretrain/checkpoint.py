"""Checkpoints: logical tensors and the few numbers that a run needs to go on, without a trace of the layout.

    RUN/checkpoints/step-00000500/
        manifest.json                                 written last; what lies where, SHA-256 of each file, the state
        shard-00001-model-00001-of-00001.safetensors  rank 0's boxes of weights (float32 masters) and moments

A checkpoint is written beside its place and renamed when everything is on the disk, so a folder with its final name is
whole. One that was damaged since is passed over on load, with a warning that names it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.boxes import held_boxes, local_boxes, row_length, wanted_rows
from parallel.engine import MOMENTS, Engine
from parallel.grid import Grid
from parallel.logical import Piece
from pretrain.errors import UserError
from pretrain.opening import FORMAT, MANIFEST, Checkpoint, State, folder_of, open_checkpoint
from pretrain.storage import Wanted, read_boxes, tensor_name, write_boxes

__all__ = ["Checkpoint", "State", "folder_of", "open_checkpoint"]

_NAME = re.compile(r"step-(\d{8})")
MOMENT_PREFIXES = tuple(tensor_name("", kind) for kind in MOMENTS)

log = logging.getLogger(__name__)


# -- saving --------------------------------------------------------------------------------------------------------


def save(run: Path, state: State, engine: Engine, grid: Grid, about: dict[str, Any]) -> Path:
    """Write a checkpoint; whole or not at all. Collective. Raises OSError where the disk fails, on every rank."""
    final = folder_of(run, state.step)
    working = _hidden(final)

    def begin() -> None:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)

    def finish() -> None:
        _write_manifest(working, state, gathered, about)
        _put_in_place(working, final)

    try:
        _on_first(grid, begin)
        gathered = _gather(write_boxes(held_boxes(engine, grid), working), grid)
        _on_first(grid, finish)
    except OSError:
        if grid.rank == 0:
            shutil.rmtree(working, ignore_errors=True)
        raise
    return final


def _hidden(folder: Path) -> Path:
    """Where a checkpoint lies while it is written or removed."""
    return folder.with_name(f".{folder.name}.partial")


def _on_first(grid: Grid, action: Callable[[], None]) -> None:
    """Do it on rank 0; every rank waits for it, and an OSError there is raised on every rank."""
    failed: OSError | None = None
    if grid.rank == 0:
        try:
            action()
        except OSError as error:
            failed = error
    failed = grid.from_first(failed)
    if failed is not None:
        raise failed


def _write_manifest(folder: Path, state: State, gathered: list[Any], about: dict[str, Any]) -> None:
    manifest = {
        "format": FORMAT,
        "state": asdict(state),
        "about": about,
        "files": {name: info for _, files in gathered for name, info in sorted(files.items())},
        "boxes": [list(asdict(entry).values()) for entries, _ in gathered for entry in entries],
    }
    with open(folder / MANIFEST, "w") as stream:
        json.dump(manifest, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _put_in_place(working: Path, final: Path) -> None:
    _sync_folder(working)
    if final.exists():  # a run that was sent back and came here again
        shutil.rmtree(final)
    os.rename(working, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(run: Path, step: int, keep_last: int, keep: Iterable[int]) -> None:
    """Leave the last `keep_last` checkpoints up to that of `step`, which was just written, and those of the steps in
    `keep`. Call it on one rank; raises OSError.

    Later ones were damaged, or the run would have gone on from them: as they count for the newest, they must go. So does
    what a killed process left half written or half removed.
    """
    for left in (run / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(left)
    steps = list_steps(run)
    keeping = {*[known for known in steps if known <= step][-keep_last:], *keep}
    for known in steps:
        if known not in keeping:
            folder = folder_of(run, known)
            os.rename(folder, _hidden(folder))
            shutil.rmtree(_hidden(folder))


def _gather(value: Any, grid: Grid) -> list[Any]:
    values: list[Any] = [None] * grid.world
    if grid.world == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


# -- finding -------------------------------------------------------------------------------------------------------


def list_steps(run: Path) -> list[int]:
    """Steps of the checkpoints in place, oldest first."""
    folder = run / "checkpoints"
    names = (_NAME.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ()))
    return sorted(int(match.group(1)) for match in names if match)


def latest(run: Path, warn: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning."""
    damaged = 0
    for step in reversed(list_steps(run)):
        try:
            return open_checkpoint(folder_of(run, step))
        except UserError as error:
            damaged += 1
            warn(f"passing over a damaged checkpoint: {error}")
    if damaged:
        raise UserError(
            f"{run}: all {damaged} checkpoints are damaged, nothing can be resumed; "
            "remove the run's folder to start anew, or put back a copy"
        )
    return None


def latest_everywhere(run: Path, grid: Grid, warn: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """`latest`, looked up by rank 0 alone and told to the others."""
    found: Any = None
    if grid.rank == 0:
        try:
            found = latest(run, warn)
        except UserError as error:
            found = error
    found = grid.from_first(found)
    if isinstance(found, UserError):
        raise found
    return found


# -- loading -------------------------------------------------------------------------------------------------------


def load_engine(checkpoint: Checkpoint, engine: Engine) -> None:
    """Weights and moments into the engine's shares, whatever layout wrote them. Collective."""
    shares = list(engine.shares())
    wanted, copies = [], []
    for share in shares:
        first, end = wanted_rows(share)
        for kind, flat in {"weight": share.master, **share.moments}.items():
            shape = (end - first, *share.parameter.local_shape[1:])  # type: ignore[attr-defined]
            rows = torch.zeros(shape, dtype=torch.float32)
            wanted += _wanted(share.path, share.parameter, first, end, kind, rows)
            copies.append((share, first, flat, rows))
    _read(checkpoint, wanted)
    with torch.no_grad():
        for share, first, flat, rows in copies:
            begin = share.start - first * row_length(share.parameter)
            flat.copy_(rows.flatten()[begin : begin + share.numel])
    engine.updates = checkpoint.state.updates
    engine.publish()


def load_weights(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Weights alone into a whole model, for generation and evaluation."""
    wanted, copies = [], []
    for path, parameter in module.named_parameters():
        values = torch.zeros(parameter.shape, dtype=torch.float32)
        wanted += _wanted(path, parameter, 0, parameter.shape[0], "weight", values)
        copies.append((parameter, values))
    weights = {entry.tensor for entry in checkpoint.entries if not entry.tensor.startswith(MOMENT_PREFIXES)}
    beyond = sorted(weights - {want.tensor for want in wanted})
    if beyond:
        raise UserError(f"{checkpoint.folder}: of another model; this one has no {beyond[0]!r:.80}")
    _read(checkpoint, wanted)
    with torch.no_grad():
        for parameter, values in copies:
            parameter.copy_(values)


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
