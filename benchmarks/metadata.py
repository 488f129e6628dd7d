"""Opening a checkpoint of 1,024 ranks and planning one rank's read of it, and which files that read opens.

The checkpoint is synthetic: 7B parameters as 8 tensor x 8 pipeline x 16 ZeRO-1 ranks would write them, one file a rank,
its manifest and every file's header true, its numbers a hole in the file (nothing is on the disk). So the read of one rank
under another layout is the real one.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import nn

from parallel.axes import ContextAxis, TensorAxis
from parallel.boxes import KINDS, Box, boxes_of_rows, local_boxes, row_length, wanted_rows
from parallel.engine import Share
from parallel.gradients import counts_once
from parallel.layers import Parts
from parallel.stages import Cut, cuts
from pretrain.config.model import ModelConfig, parameter_count
from pretrain.models.gpt import GPT
from pretrain.opening import FORMAT, MANIFEST, State, open_checkpoint
from pretrain.storage import Entry, Wanted, read_boxes, tensor_name

MODEL = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    ffn_hidden_size=11008,
    positions="rope",
    norm="rms",
    activation="swiglu",
    biases=False,
    tie_embeddings=False,
)
VOCABULARY, TOKENS = 32000, 2048


class Degrees(NamedTuple):
    """tensor x pipeline x data, ZeRO-1."""

    tensor: int
    pipeline: int
    data: int


WRITTEN, READ = Degrees(8, 8, 16), Degrees(4, 4, 8)


def measure(parent: Path) -> dict[str, Any]:
    """Seconds of each step of opening and reading, and the files opened beside those that are needed."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name) / "step-00000001"
        folder.mkdir()
        entries = write_checkpoint(folder)
        started = time.perf_counter()
        checkpoint = open_checkpoint(folder, verify=False)
        opened = time.perf_counter()
        told = pickle.loads(pickle.dumps(checkpoint))  # noqa: S301 its own, as rank 0 sends it
        sent = time.perf_counter()
        wanted = list(_wanted(READ, tensor_rank=1, stage=2, data_rank=3))
        planning = time.perf_counter()
        with _Opened() as files:
            read_boxes(wanted, folder, told.entries)
        read = time.perf_counter()
        needed = {entry.file for entry in _overlapping(wanted, entries)}
    return {
        "parameters": parameter_count(MODEL, VOCABULARY, TOKENS),
        "ranks": WRITTEN.tensor * WRITTEN.pipeline * WRITTEN.data,
        "boxes": len(entries),
        "open_seconds": opened - started,
        "send_seconds": sent - opened,
        "plan_seconds": files.first - planning,
        "read_seconds": read - files.first,
        "read_bytes": 4 * sum(want.target.numel() for want in wanted),
        "files": len(checkpoint.files),
        "files_opened": len(set(files.paths)),
        "times_opened": len(files.paths),
        "files_needed": len(needed),
        "only_needed": {Path(path).name for path in files.paths} == needed,
    }


# -- the checkpoint --------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path) -> list[Entry]:
    """A manifest and a file a rank; the boxes that it lists."""
    entries: list[Entry] = []
    files: dict[str, dict[str, Any]] = {}
    ranks = 0
    for stage in range(WRITTEN.pipeline):
        for tensor_rank in range(WRITTEN.tensor):
            parameters = _parameters(WRITTEN, tensor_rank, stage)
            for data_rank in range(WRITTEN.data):
                ranks += 1
                boxes = list(_written(_shares(parameters, data_rank, WRITTEN.data), tensor_rank))
                file = f"shard-{ranks:05d}-model-00001-of-00001.safetensors"
                files[file] = {"sha256": "", "bytes": _write_hollow(folder / file, boxes)}
                entries += [_entry(box, file) for box in boxes]
    manifest = {
        "format": FORMAT,
        "state": dataclasses.asdict(State(step=1)),
        "about": {},
        "files": files,
        "boxes": [list(dataclasses.asdict(entry).values()) for entry in entries],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return entries


def _entry(box: Box, file: str) -> Entry:
    return Entry(tensor_name(box.name, box.kind), box.shape, box.offset, tuple(box.values.shape), file)


def _write_hollow(path: Path, boxes: list[Box]) -> int:
    """A safetensors file of the boxes' shapes without their numbers; its size."""
    header, end = {}, 0
    for box in boxes:
        begin, end = end, end + 4 * box.values.numel()
        shape = list(box.values.shape)
        header[tensor_name(box.name, box.kind)] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path.stat().st_size


def _parameters(degrees: Degrees, tensor_rank: int, stage: int) -> list[tuple[str, nn.Parameter]]:
    """What a rank of tensor and pipeline parallelism holds, without numbers."""
    each = MODEL.num_layers // degrees.pipeline
    cut: Cut = cuts([each] * degrees.pipeline, degrees.pipeline, stage)[0]
    parts = Parts(TensorAxis(degrees.tensor, tensor_rank), ContextAxis())
    with torch.device("meta"):
        model = GPT(MODEL, parts, VOCABULARY, TOKENS, layers=cut.layers, first=cut.first, last=cut.last)
    return list(model.named_parameters())


def _shares(parameters: list[tuple[str, nn.Parameter]], data_rank: int, data: int) -> Iterator[Share]:
    """ZeRO-1: the parameters one after the other, cut into equal flat parts."""
    total = sum(parameter.numel() for _, parameter in parameters)
    first, end = (total * rank // data for rank in (data_rank, data_rank + 1))
    place = 0
    for path, parameter in parameters:
        begin, stop = max(first, place), min(end, place + parameter.numel())
        if begin < stop:
            yield Share(path, parameter, begin - place, stop - begin, torch.empty(0), {})
        place += parameter.numel()


def _written(shares: Iterator[Share], tensor_rank: int) -> Iterator[Box]:
    """The whole rows that begin in the shares, as `parallel.boxes` gives them out."""
    for share in shares:
        length = row_length(share.parameter)
        first, end = -(-share.start // length), -(-(share.start + share.numel) // length)
        if first < end and counts_once(share.parameter, tensor_rank):
            shape = (end - first, *share.parameter.local_shape[1:])  # type: ignore[attr-defined]
            rows = torch.empty(shape, device="meta")
            yield from boxes_of_rows(share.path, share.parameter, first, dict.fromkeys(KINDS, rows))


# -- the read --------------------------------------------------------------------------------------------------------


def _wanted(degrees: Degrees, tensor_rank: int, stage: int, data_rank: int) -> Iterator[Wanted]:
    """What a rank of another layout loads, as `pretrain.checkpoint.load_engine` asks for it."""
    for share in _shares(_parameters(degrees, tensor_rank, stage), data_rank, degrees.data):
        first, end = wanted_rows(share)
        for kind in KINDS:
            for name, piece, begin, stop in local_boxes(share.path, share.parameter, first, end):
                offset = (piece.offset[0] + begin - piece.start, *piece.offset[1:])
                target = torch.zeros(stop - begin, *piece.size[1:])
                yield Wanted(tensor_name(name, kind), piece.shape, offset, target)


def _overlapping(wanted: list[Wanted], entries: list[Entry]) -> Iterator[Entry]:
    for want in wanted:
        for entry in entries:
            if entry.tensor == want.tensor and all(
                offset < other + size and other < offset + extent
                for offset, size, other, extent in zip(
                    entry.offset, want.target.shape, want.offset, entry.size, strict=True
                )
            ):
                yield entry


class _Opened:
    """Notes which safetensors files are opened."""

    def __enter__(self) -> _Opened:
        self.paths: list[str] = []
        self.first = 0.0  # when the first was opened
        self.real = safetensors.safe_open

        def noting(filename: Any, *args: Any, **options: Any) -> Any:
            self.first = self.first or time.perf_counter()
            self.paths.append(str(filename))
            return self.real(filename, *args, **options)

        safetensors.safe_open = noting  # type: ignore[assignment, misc]
        return self

    def __exit__(self, *error: object) -> None:
        safetensors.safe_open = self.real  # type: ignore[misc]
