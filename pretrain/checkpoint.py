"""Checkpoints: logical tensors and the few numbers that a run needs to go on, without a trace of the layout.

    RUN/checkpoints/step-00000500/
        manifest.json                                 written last; what lies where, SHA-256 of each file, the state
        shard-00001-model-00001-of-00001.safetensors  rank 0's boxes of weights (float32 masters) and moments

A checkpoint is written beside its place and renamed when everything is on the disk, so a folder with its final name is
whole. One that was damaged since is passed over on load, with a warning that names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.boxes import held_boxes, local_boxes, row_length, wanted_rows
from parallel.engine import Engine
from parallel.grid import Grid
from parallel.logical import Piece
from pretrain.errors import UserError
from pretrain.storage import Entry, Wanted, read_boxes, tensor_name, write_boxes

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 2**30  # bytes; a larger one is not ours
_NAME = re.compile(r"step-(\d{8})")
_SAFE_FILE = re.compile(r"[A-Za-z0-9._-]+\.safetensors")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """All that a run's future depends on beside its config and the tensors."""

    step: int = 0  # steps done
    samples: int = 0  # samples consumed
    updates: int = 0  # steps applied: AdamW's bias correction counts these
    bad_steps: int = 0  # steps in a row that were not applied
    best_loss: float | None = None  # of the validations so far
    best_step: int | None = None
    validations_since_best: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk, as its manifest describes it."""

    folder: Path
    state: State
    entries: list[Entry]
    files: dict[str, dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)  # layout that wrote it, versions: for people

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.files.values())


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


# -- saving --------------------------------------------------------------------------------------------------------


def save(run: Path, state: State, engine: Engine, grid: Grid, about: dict[str, Any]) -> Path:
    """Write a checkpoint; whole or not at all. Collective. Raises OSError where the disk fails, on every rank."""
    final = folder_of(run, state.step)
    working = final.with_name(f".{final.name}.partial")
    if grid.rank == 0:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir(parents=True)
    grid.wait()
    try:
        entries, files = write_boxes(held_boxes(engine, grid), working)
        gathered = _gather((entries, files), grid)
        if grid.rank == 0:
            _write_manifest(working, state, gathered, about)
            _put_in_place(working, final)
    except OSError:
        if grid.rank == 0:
            shutil.rmtree(working, ignore_errors=True)
        raise
    grid.wait()
    return final


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


def prune(run: Path, keep_last: int, keep: Iterable[int]) -> None:
    """Remove all but the last `keep_last` checkpoints and those of the steps in `keep`; call it on one rank."""
    steps = list_steps(run)
    keeping = {*steps[-keep_last:], *keep}
    for step in steps:
        if step not in keeping:
            shutil.rmtree(folder_of(run, step))


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


def open_checkpoint(folder: Path, verify: bool = True) -> Checkpoint:
    """Read and check a checkpoint's manifest and, with `verify`, every file's hash. Raises UserError where it is damaged."""
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise UserError(f"{folder}: no {MANIFEST}; this is no checkpoint, or one that was cut off")
    if path.stat().st_size > MANIFEST_LIMIT:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are more than a manifest can have")
    try:
        manifest = json.loads(path.read_text())
        checkpoint = _parse(folder, manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    for name, info in checkpoint.files.items():
        _check_file(folder / name, info, verify)
    return checkpoint


def _parse(folder: Path, manifest: dict[str, Any]) -> Checkpoint:
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder}: format {manifest['format']!r}; this version reads format {FORMAT}")
    files = manifest["files"]
    for name in files:
        if not _SAFE_FILE.fullmatch(name):
            raise ValueError(f"file name {name!r}")
    entries = [
        Entry(tensor, tuple(shape), tuple(offset), tuple(size), file)
        for tensor, shape, offset, size, file in manifest["boxes"]
    ]
    for entry in entries:
        if entry.file not in files:
            raise ValueError(f"{entry.tensor} lies in {entry.file!r}, which is not listed")
    return Checkpoint(folder, State(**manifest["state"]), entries, files, manifest["about"])


def _check_file(path: Path, info: dict[str, Any], verify: bool) -> None:
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: missing, or a link")
    if path.stat().st_size != info["bytes"]:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, the manifest says {info['bytes']:,}")
    if verify and _sha256(path) != info["sha256"]:
        raise UserError(f"{path}: altered since it was written (SHA-256 differs from the manifest's)")


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    """Weights alone into a model, for generation and evaluation."""
    wanted, copies = [], []
    for path, parameter in module.named_parameters():
        values = torch.zeros(parameter.shape, dtype=torch.float32)
        wanted += _wanted(path, parameter, 0, parameter.shape[0], "weight", values)
        copies.append((parameter, values))
    _read(checkpoint, wanted)
    with torch.no_grad():
        for parameter, values in copies:
            parameter.copy_(values)


def _wanted(path: str, parameter: nn.Parameter, first: int, end: int, kind: str, rows: Tensor) -> list[Wanted]:
    return [
        Wanted(tensor_name(name, kind), _offset(piece, begin), rows[begin - first : stop - first])
        for name, piece, begin, stop in local_boxes(path, parameter, first, end)
    ]


def _offset(piece: Piece, row: int) -> tuple[int, ...]:
    return (piece.offset[0] + row - piece.start, *piece.offset[1:])


def _read(checkpoint: Checkpoint, wanted: list[Wanted]) -> None:
    have = {entry.tensor for entry in checkpoint.entries}
    missing = sorted({want.tensor for want in wanted} - have)
    if missing:
        raise UserError(f"{checkpoint.folder}: lacks {len(missing)} tensors of this model, the first {missing[0]!r}")
    read_boxes(wanted, checkpoint.folder, checkpoint.entries)
