"""Opening a checkpoint: its manifest checked field by field, its files by size and hash.

A checkpoint may come from elsewhere, or have been damaged since it was written. So nothing in it is believed before it is
checked, and nothing is unpickled: what is wrong raises UserError, before a tensor is read. When a checkpoint is open, its
boxes tile every one of its tensors exactly once, and each lies in a file of its own folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from pretrain.config.folder import CHECKPOINTS
from pretrain.errors import UserError
from pretrain.storage import Entry

FORMAT = 3
SINCE = {
    2: ("losses", "loss_mean", "loss_distance", "skipped", "rewinds"),
    3: ("passed", "passed_samples"),
}  # of the state
PAIRS = ("skipped", "passed")
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 2**30  # bytes; a larger one is not ours
_SAFE_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
Boundaries = tuple[tuple[int, ...], tuple[int, ...]]


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
    losses: int = 0  # of the level that spikes are judged by, as are the next two (`pretrain.spikes.Level`)
    loss_mean: float = 0.0
    loss_distance: float = 0.0
    skipped: tuple[tuple[int, int], ...] = ()  # ranges of sample numbers, [first, end), that were passed over
    rewinds: int = 0  # times that the run was sent back
    passed: tuple[tuple[int, int], ...] = ()  # (source, chunk) that could not be had, and are read no more
    passed_samples: int = 0  # that were in these so far


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

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Hash every `parts`-th file. Raises UserError where one was altered since it was written."""
        for name, info in list(self.files.items())[part::parts]:
            if _sha256(self.folder / name) != info["sha256"]:
                path = self.folder / name
                raise UserError(f"{path}: altered since it was written (SHA-256 differs from the manifest's)")


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08d}"


def open_checkpoint(folder: Path, verify: bool = True) -> Checkpoint:
    """Read and check a checkpoint's manifest, the files' sizes and, with `verify`, their hashes. Raises UserError where it
    is damaged."""
    path = folder / MANIFEST
    try:
        checkpoint = _parse(folder, json.loads(_manifest_bytes(path)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    for name, info in checkpoint.files.items():
        _check_file(folder / name, info)
    if verify:
        checkpoint.verify()
    return checkpoint


def _manifest_bytes(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path.parent}: no {MANIFEST}; this is no checkpoint, or one that was cut off")
    if path.stat().st_size > MANIFEST_LIMIT:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are more than a manifest can have")
    return path.read_bytes()


def _check_file(path: Path, info: dict[str, Any]) -> None:
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path}: missing, or a link")
    if path.stat().st_size != info["bytes"]:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes, the manifest says {info['bytes']:,}")


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


# -- the manifest's fields -------------------------------------------------------------------------------------------


def _parse(folder: Path, manifest: dict[str, Any]) -> Checkpoint:
    if manifest["format"] not in range(1, FORMAT + 1):
        raise UserError(f"{folder}: format {manifest['format']!r:.60}; this version reads formats 1 to {FORMAT}")
    state, files, about = _state(manifest["state"], manifest["format"]), _files(manifest["files"]), manifest["about"]
    if folder.name != folder_of(folder, state.step).name:
        raise ValueError(f"it is the checkpoint of step {state.step}")
    if not isinstance(about, dict):
        raise ValueError("`about` is no mapping")
    entries = [_entry(*box) for box in manifest["boxes"]]
    tensors: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.file not in files:
            raise ValueError(f"{entry.tensor:.60} lies in {entry.file!r:.60}, which is not listed")
        tensors[entry.tensor].append(entry)
    for name, boxes in tensors.items():
        if not _tiles(boxes):
            raise ValueError(f"the boxes of {name:.60} do not make the tensor")
    return Checkpoint(folder, state, entries, files, about)


def _state(values: dict[str, Any], number: int) -> State:
    later = [name for since, names in SINCE.items() if number < since for name in names]
    for part in fields(State):
        if part.name in later:
            continue
        value, optional = values[part.name], part.default is None
        if not _is_of_state(part.name, value) and not (optional and value is None):
            raise ValueError(f"state.{part.name} is {value!r:.60}")
    pairs = {name: tuple((one, other) for one, other in values.get(name, ())) for name in PAIRS}
    return State(**{**values, **pairs})


def _is_of_state(name: str, value: Any) -> bool:
    if name in PAIRS:
        numbers = [0, *(number for pair in value for number in pair)] if isinstance(value, list) else [-1]
        whole = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        ordered = numbers == sorted(numbers) if name == "skipped" else value == sorted(value)
        return whole and len(numbers) == 2 * len(value) + 1 and all(len(pair) == 2 for pair in value) and ordered
    if name in ("best_loss", "loss_mean", "loss_distance"):
        return type(value) is float
    return type(value) is int and 0 <= value < 2**63


def _files(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for name, info in files.items():
        if not _SAFE_FILE.fullmatch(name):
            raise ValueError(f"file name {name!r:.60}")
        if type(info["bytes"]) is not int or not isinstance(info["sha256"], str):
            raise ValueError(f"size and hash of {name} are {info!r:.60}")
    return files


def _entry(tensor: str, shape: list[int], offset: list[int], size: list[int], file: str) -> Entry:
    entry = Entry(tensor, tuple(shape), tuple(offset), tuple(size), file)
    numbers = (*entry.shape, *entry.offset, *entry.size)
    dims = zip(entry.offset, entry.size, entry.shape, strict=True)
    inside = all(first >= 0 and length > 0 and first + length <= extent < 2**48 for first, length, extent in dims)
    known = isinstance(tensor, str) and all(type(number) is int for number in numbers)
    if not known or not inside or len(entry.shape) not in (1, 2):
        raise ValueError(f"a box of {tensor!r:.60} is at {offset!r:.60}, {size!r:.60} of {shape!r:.60}")
    return entry


def _tiles(boxes: list[Entry]) -> bool:
    """Whether the boxes cover their tensor, each element once: they are disjoint and have its size. Ranks cut a tensor
    into ranges of columns and each of these into ranges of rows, so in order only neighbours can overlap."""
    if len({box.shape for box in boxes}) > 1:
        return False
    rows: dict[Boundaries, list[tuple[int, int]]] = defaultdict(list)
    for box in boxes:
        rows[box.offset[1:], box.size[1:]].append((box.offset[0], box.size[0]))
    columns = [(offset[0], size[0]) for offset, size in rows if offset]
    disjoint = all(_disjoint(ranges) for ranges in (columns, *rows.values()))
    return disjoint and sum(math.prod(box.size) for box in boxes) == math.prod(boxes[0].shape)


def _disjoint(ranges: list[tuple[int, int]]) -> bool:
    return all(first + length <= second for (first, length), (second, _) in pairwise(sorted(ranges)))
