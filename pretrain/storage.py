"""Boxes of logical tensors to and from safetensors files.

Writing: each rank writes its own boxes from where they lie in memory into its own files, hashed as they are written.
Reading, through torch.distributed.checkpoint: what lies where comes from the checkpoint's manifest, so only files with
wanted boxes are opened, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
    _HFStorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.boxes import Box

FILE_BYTES = 2**30
PIECE_BYTES = 2**24  # hashed and written at a time


def tensor_name(name: str, kind: str) -> str:
    """The name in the file: weights under their own, moments behind theirs."""
    return name if kind == "weight" else f"{kind}/{name}"


@dataclass(frozen=True)
class Entry:
    """One box in one file."""

    tensor: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str


def file_name(rank: int, number: int) -> str:
    """Of a rank's files, filled one after the other."""
    return f"rank-{rank:05d}-{number:03d}.safetensors"


# -- writing -------------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """What one rank has written."""

    entries: list[Entry]
    files: dict[str, dict[str, Any]]  # name -> SHA-256 and bytes


def write_boxes(boxes: list[Box], folder: Path, rank: int) -> Written:
    """Write this rank's boxes below `folder`, synced to the disk. Raises OSError where the disk fails."""
    # Two boxes of one tensor cannot share a file (it has one offset a name): a fused parameter never makes them.
    assert len({(box.name, box.kind) for box in boxes}) == len(boxes), "two boxes of one tensor on one rank"
    written = Written([], {})
    for number, part in enumerate(_parts(boxes)):
        name = file_name(rank, number)
        written.files[name] = _write_file(folder / name, part)
        for box in part:
            tensor, size = tensor_name(box.name, box.kind), tuple(box.values.shape)
            written.entries.append(Entry(tensor, box.shape, box.offset, size, name))
    return written


def _parts(boxes: list[Box]) -> Iterator[list[Box]]:
    """What goes to each file, filled in order."""
    part: list[Box] = []
    filled = 0
    for box in boxes:
        if part and filled + box.values.nbytes > FILE_BYTES:
            yield part
            part, filled = [], 0
        part.append(box)
        filled += box.values.nbytes
    if part:
        yield part


def _write_file(path: Path, boxes: list[Box]) -> dict[str, Any]:
    """Write, hash and sync at once, each in a thread: one after the other they take twice the disk's time. None of the
    three holds the interpreter's lock, so the training goes on meanwhile; safetensors' own writer does, for a second a
    gigabyte and more."""
    digest, count = hashlib.sha256(), 0
    syncing: Future[None] | None = None
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as syncer:
        for piece in _pieces(boxes):
            hashing = hasher.submit(digest.update, piece)
            _write_piece(file, piece)
            count += len(piece)
            if syncing is None or syncing.done():
                syncing = syncer.submit(os.fdatasync, file.fileno())
            hashing.result()
        assert syncing is not None
        syncing.result()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": count}


def _write_piece(file: FileIO, piece: memoryview) -> None:
    written = 0
    while written < len(piece):
        written += file.write(piece[written:])


def _pieces(boxes: list[Box]) -> Iterator[memoryview]:
    """A safetensors file: the header's length, the header, the numbers (little-endian float32) of each box."""
    header: dict[str, Any] = {}
    end = 0
    for box in boxes:
        begin, end = end, end + box.values.nbytes
        place = {"dtype": "F32", "shape": list(box.values.shape), "data_offsets": [begin, end]}
        header[tensor_name(box.name, box.kind)] = place
    offsets = {tensor_name(box.name, box.kind): {SAVED_OFFSETS_KEY: box.offset} for box in boxes}
    # torch.distributed.checkpoint's own reader finds here which part of its tensor each box is.
    header["__metadata__"] = {DCP_VERSION_KEY: str(HF_DCP_VERSION), CUSTOM_METADATA_KEY: json.dumps(offsets)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for box in boxes:
        whole = box.values.numpy().data.cast("B")
        yield from (whole[first : first + PIECE_BYTES] for first in range(0, len(whole), PIECE_BYTES))


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A box to read, of a tensor of this shape, and where to put it: `target` is float32 of the box's size."""

    tensor: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    target: Tensor


class _LoadPlanner(LoadPlanner):
    def __init__(self, wanted: list[Wanted]) -> None:
        self.wanted = wanted
        self.targets = {(want.tensor, want.offset): want.target for want in wanted}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for want in self.wanted:
            stored = self.metadata.state_dict_metadata[want.tensor]
            chunk = ChunkStorageMetadata(torch.Size(want.offset), want.target.shape)
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(want.tensor, stored, [chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("checkpoints hold tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.dest_index.offset is not None
        target = self.targets[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class _Reader(HuggingFaceStorageReader):
    """Knows from the manifest what lies where, instead of opening every file on every rank."""

    def __init__(self, folder: Path, entries: list[Entry]) -> None:
        super().__init__(str(folder))
        self.entries = entries

    def read_metadata(self) -> Metadata:
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, Any] = {}
        properties = TensorProperties(dtype=torch.float32)
        for entry in self.entries:
            known = tensors.setdefault(entry.tensor, TensorStorageMetadata(properties, torch.Size(entry.shape), []))
            known.chunks.append(ChunkStorageMetadata(torch.Size(entry.offset), torch.Size(entry.size)))
            index = MetadataIndex(entry.tensor, torch.Size(entry.offset))
            path = str(self.path / entry.file)  # type: ignore[operator]
            places[index] = _HFStorageInfo(path, torch.Size(entry.size), torch.float32)
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def _process_read_request(self, f: Any, req: ReadItem, planner: LoadPlanner) -> None:
        stored, place = f.get_slice(req.storage_index.fqn), self.storage_data[req.storage_index]
        if stored.get_dtype() != "F32" or tuple(stored.get_shape()) != tuple(place.shape):
            found = f"{stored.get_dtype()} {tuple(stored.get_shape())}, not F32 {tuple(place.shape)}"
            raise ValueError(f"{place.relative_path}: {req.storage_index.fqn} is {found}")
        super()._process_read_request(f, req, planner)


def read_boxes(wanted: list[Wanted], folder: Path, entries: list[Entry]) -> None:
    """Fill every target. Raises OSError where a file cannot be read or does not hold what its entries say."""
    try:
        with warnings.catch_warnings():
            # That it reads in a single process is just what is wanted: the manifest has told each rank what lies where.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({}, storage_reader=_Reader(folder, entries), planner=_LoadPlanner(wanted), no_dist=True)
    except dcp.api.CheckpointException as error:
        [(cause, _)] = error.failures.values()
        raise OSError(str(cause)) if isinstance(cause, OSError | ValueError | SafetensorError) else cause from error
