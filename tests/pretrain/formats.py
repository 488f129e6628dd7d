"""Writers of every format of checkpoints and of shards' manifests that there was, frozen: what older versions have left on
disks must stay readable.

When `pretrain.opening.FORMAT` or `pretrain.data.manifest.VERSION` goes up, add a writer and leave these as they are. They use
nothing of the program, so that no change of it can change them.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

Tensors = dict[str, tuple[tuple[int, ...], list[float]]]  # name -> shape and numbers
STATE = {"step": 3, "samples": 24, "updates": 2, "bad_steps": 1, "best_loss": 3.5, "best_step": 2}


def write_format_1(folder: Path, tensors: Tensors) -> None:
    """Tensors cut after their first row into the files of two ranks, as since the first version. Up to 2026-11 the files
    had other names and no box's place in the header; readers go by the manifest."""
    folder.mkdir(parents=True)
    files, boxes = {}, []
    for rank in (0, 1):
        name = f"shard-0000{rank + 1}-model-00001-of-00001.safetensors"
        header, data = {}, b""
        for tensor, (shape, values) in sorted(tensors.items()):
            row = len(values) // shape[0]
            rows = (0, 1) if rank == 0 else (1, shape[0] - 1)
            if rows[1] == 0:
                continue
            part = values[rows[0] * row : (rows[0] + rows[1]) * row]
            content = struct.pack(f"<{len(part)}f", *part)
            size = [rows[1], *shape[1:]]
            header[tensor] = {"dtype": "F32", "shape": size, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
            boxes.append([tensor, list(shape), [rows[0], *[0] * (len(shape) - 1)], size, name])
        text = json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + data
        (folder / name).write_bytes(content)
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    state = {**STATE, "validations_since_best": 0}
    about = {"layout": "dp2, zero 1", "processes": 2, "data": "0123", "versions": {"torch": "2.13.0"}}
    manifest = {"format": 1, "state": state, "about": about, "files": files, "boxes": boxes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_format_2(folder: Path, tensors: Tensors) -> None:
    """With what spikes are judged by and the ranges that were passed over in the state."""
    write_format_1(folder, tensors)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format"] = 2
    manifest["state"] |= {"losses": 9, "loss_mean": 3.25, "loss_distance": 0.5, "skipped": [[8, 16]], "rewinds": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_format_3(folder: Path, tensors: Tensors) -> None:
    """With the chunks that could not be had in the state."""
    write_format_2(folder, tensors)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format"] = 3
    manifest["state"] |= {"passed": [[0, 7], [1, 2]], "passed_samples": 5}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_manifest_1(folder: Path) -> None:
    """Put the manifest of version 1 in place of a newer one: the tokenizer was always tokenizer.model."""
    value = json.loads((folder / "manifest.json").read_bytes())
    names = (
        "format",
        "packing",
        "dtype",
        "tokens_per_chunk",
        "vocab_size",
        "special",
        "documents",
        "tokens",
        "text_bytes",
    )
    kept = {name: value[name] for name in (*names, "chunks", "shards")}
    kept |= {
        "version": 1,
        "tokenizer": {"sha256": hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()},
    }
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    (folder / "manifest.json").write_bytes(text.encode() + b"\n")


def write_manifest_2(folder: Path) -> None:
    """With the tokenizer's file by name; rows of pairs were not known."""
    value = json.loads((folder / "manifest.json").read_bytes())
    value.pop("padding", None)
    assert value["packing"] == "concat"
    text = json.dumps({**value, "version": 2}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    (folder / "manifest.json").write_bytes(text.encode() + b"\n")


def write_manifest_3(folder: Path) -> None:
    """With rows of pairs, in the order of their file; no other rows were known, nor was what fills them counted."""
    value = json.loads((folder / "manifest.json").read_bytes())
    value.pop("padding", None)
    packing = value["packing"].replace("fit-pairs", "pairs")
    assert packing == "concat" or packing.split()[0] == "pairs"
    text = json.dumps(
        {**value, "version": 3, "packing": packing}, sort_keys=True, separators=(",", ":"), ensure_ascii=True
    )
    (folder / "manifest.json").write_bytes(text.encode() + b"\n")


def write_manifest_4(folder: Path) -> None:
    """The one that is there."""
    value = json.loads((folder / "manifest.json").read_bytes())
    assert value["version"] == 4 and type(value["padding"]) is int


MANIFEST_WRITERS: dict[int, Callable[[Path], None]] = {
    1: write_manifest_1,
    2: write_manifest_2,
    3: write_manifest_3,
    4: write_manifest_4,
}
WRITERS: dict[int, Callable[[Path, Tensors], None]] = {1: write_format_1, 2: write_format_2, 3: write_format_3}
