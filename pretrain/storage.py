"""Boxes of logical tensors to and from safetensors files, through torch.distributed.checkpoint.

Writing: each rank writes its own boxes into its own files, each at most a gigabyte (they are built in memory), hashed as
they are written. Reading: what lies where comes from the checkpoint's manifest, so only files with wanted boxes are
opened, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.boxes import Box

FILE_BYTES = 2**30


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


# -- writing -------------------------------------------------------------------------------------------------------


class _SavePlanner(SavePlanner):
    """Plans this rank's boxes as they are; `tensor -> Box` is unique within a rank."""

    def __init__(self, boxes: list[Box]) -> None:
        self.boxes = {(tensor_name(box.name, box.kind), box.offset): box for box in boxes}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(tensor, box) for (tensor, _), box in self.boxes.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata(state_dict_metadata={})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        return self.boxes[write_item.index.fqn, tuple(write_item.index.offset)].values


def _write_item(tensor: str, box: Box) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(box.offset), box.values.shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=box.values.dtype), torch.Size(box.shape))
    return WriteItem(MetadataIndex(tensor, torch.Size(box.offset)), WriteItemType.SHARD, tensor_data=data)


class _HashedStream:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.sha256, self.bytes = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Writer(HuggingFaceStorageWriter):
    """Each rank's files cut at FILE_BYTES by its own plan, and hashed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.files: dict[str, dict[str, Any]] = {}
        create_stream = self.fs.create_stream

        @contextmanager
        def hashed(path: Any, mode: str) -> Iterator[Any]:
            with create_stream(path, mode) as stream:
                wrapped = _HashedStream(stream)
                yield wrapped
            self.files[Path(path).name] = {"sha256": wrapped.sha256.hexdigest(), "bytes": wrapped.bytes}

        self.fs.create_stream = hashed  # type: ignore[method-assign]

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(plan, storage_data={"shard_index": rank, "fqn_to_index_mapping": _files_of(plan.items)})
            for rank, plan in enumerate(plans, start=1)
        ]


def _files_of(items: list[WriteItem]) -> dict[str, int]:
    """tensor -> number of the file it goes to, from 1, filled in order."""
    files: dict[str, int] = {}
    number, filled = 1, 0
    for item in items:
        assert item.tensor_data is not None
        size = 4 * item.tensor_data.chunk.sizes.numel()
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        files[item.index.fqn] = number
        filled += size
    return files


def write_boxes(boxes: list[Box], folder: Path) -> tuple[list[Entry], dict[str, dict[str, Any]]]:
    """Write this rank's boxes below `folder`, synced to the disk. Collective.

    Returns this rank's entries and its files' hashes and sizes. Raises OSError where the disk fails.
    """
    # Two boxes of one tensor cannot share a file (it has one offset a name): a fused parameter never makes them.
    assert len({(box.name, box.kind) for box in boxes}) == len(boxes), "two boxes of one tensor on one rank"
    writer = _Writer(folder)
    try:
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(boxes))
    except dcp.api.CheckpointException as error:
        raise _cause(error, OSError) from error
    where = _file_of_tensors(writer, boxes)
    entries = [
        Entry(tensor, box.shape, box.offset, tuple(box.values.shape), where[tensor])
        for box in boxes
        for tensor in [tensor_name(box.name, box.kind)]
    ]
    return entries, writer.files


def _cause(error: dcp.api.CheckpointException, *expected: type[Exception]) -> BaseException:
    """What to raise for the failures of some ranks: an OSError of them all if each is one of the expected, else the first
    that is not, such as a Ctrl-C."""
    causes = {rank: cause for rank, (cause, _) in error.failures.items()}
    other = [cause for cause in causes.values() if not isinstance(cause, expected)]
    return other[0] if other else OSError("; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items()))


def _file_of_tensors(writer: _Writer, boxes: list[Box]) -> dict[str, str]:
    plan = [_write_item(tensor_name(box.name, box.kind), box) for box in boxes]
    names = sorted(writer.files)  # numbered, so in order
    return {tensor: names[number - 1] for tensor, number in _files_of(plan).items()}


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
    """Fill every target. Collective where torch.distributed is initialised. Raises OSError where a file cannot be read or
    does not hold what its entries say."""
    try:
        with warnings.catch_warnings():
            # That it reads in a single process is just what is wanted there.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({}, storage_reader=_Reader(folder, entries), planner=_LoadPlanner(wanted))
    except dcp.api.CheckpointException as error:
        raise _cause(error, OSError, ValueError, SafetensorError) from error
