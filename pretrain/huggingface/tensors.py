"""Safetensors files of Hugging Face folders, one tensor in memory at a time.

Written: files of at most a gigabyte (a larger tensor has one of its own), with an index where there are several. Read: from
the one file or those that the index names, which must lie in the folder itself. Pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.errors import UserError
from pretrain.storage import FILE_BYTES, PIECE_BYTES
from pretrain.tokenization.library import parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_JSON_BYTES = 64 << 20
_SAFE_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "tf_model.h5", "flax_model.msgpack")


class Planned(NamedTuple):
    """A tensor to write: made when its turn comes, and let go after."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


# -- writing -----------------------------------------------------------------------------------------------------------


def parts_of(tensors: Sequence[Planned], width: int) -> list[list[Planned]]:
    """What goes to each file, filled in order. width: bytes a number."""
    parts: list[list[Planned]] = []
    filled = 0
    for tensor in tensors:
        size = tensor.numel * width
        if not parts or filled + size > FILE_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += size
    return parts


def model_files(count: int) -> list[str]:
    """Names of a model's files, as transformers looks for them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_model(folder: Path, tensors: Sequence[Planned], dtype: torch.dtype, tell: Callable[[int], None]) -> None:
    """All tensors in `dtype`, and their index. tell: takes the bytes written since the last call."""
    parts = parts_of(tensors, dtype.itemsize)
    places: dict[str, str] = {}
    for name, part in zip(model_files(len(parts)), parts, strict=True):
        write_file(folder / name, part, dtype, tell, {"format": "pt"})
        places |= {tensor.name: name for tensor in part}
    if len(parts) > 1:
        total = sum(tensor.numel for tensor in tensors) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(
    path: Path, part: Sequence[Planned], dtype: torch.dtype, tell: Callable[[int], None], about: dict[str, str]
) -> dict[str, Any]:
    """One safetensors file; its SHA-256 and bytes."""
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for tensor in part:
        begin, end = end, end + tensor.numel * dtype.itemsize
        header[tensor.name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, count = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in _pieces(text, part, dtype):
            digest.update(piece)
            file.write(piece)
            count += len(piece)
            tell(len(piece))
    return {"sha256": digest.hexdigest(), "bytes": count}


def _pieces(header: bytes, part: Sequence[Planned], dtype: torch.dtype) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in part:
        values = tensor.make().to(dtype).contiguous()
        assert tuple(values.shape) == tensor.shape, f"{tensor.name}: {tuple(values.shape)}, planned {tensor.shape}"
        whole = values.flatten().view(torch.uint8).numpy().data
        yield from (whole[first : first + PIECE_BYTES] for first in range(0, len(whole), PIECE_BYTES))


# -- reading -----------------------------------------------------------------------------------------------------------


class Weights:
    """The tensors of a folder by name. Use it as a context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._places = self._find()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor, from the file's header."""
        return tuple(self._file(self._places[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor, in float32. Raises UserError where it holds no numbers of a floating-point type."""
        path = self.folder / self._places[name]
        try:
            values: Tensor = self._file(self._places[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if not values.is_floating_point():
            raise UserError(f"{path}: {name} holds {values.dtype}, not floating-point numbers.")
        return values.float()

    def _find(self) -> dict[str, str]:
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        if not (self.folder / INDEX).is_file():
            raise _no_weights(self.folder)
        path = self.folder / INDEX
        places = parse_json(read_limited(path), str(path)).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{path}: has no weight_map.")
        for name, file in places.items():
            if not isinstance(file, str) or not _SAFE_FILE.fullmatch(file):
                raise UserError(f"{path}: {name:.60} lies in {file!r:.60}, which is no name of a file in the folder.")
            if not (self.folder / file).is_file():
                raise UserError(f"{path}: {file} is missing.")
        for file in set(places.values()):
            held = set(self._file(file).keys())
            lacking = sorted(name for name, place in places.items() if place == file and name not in held)
            if lacking:
                raise UserError(f"{self.folder / file}: lacks {lacking[0]}, which {INDEX} says it holds.")
        return places

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / name}: is no safetensors file: {error}") from error
        return self._files[name]


def _no_weights(folder: Path) -> UserError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if not pickles:
        return UserError(f"{folder}: holds no weights: neither {SINGLE} nor {INDEX}.")
    return UserError(
        f"{folder}: its weights are only in {pickles[0]}, a format that can run code when it is read. Where you trust it, "
        f"convert it once: python -c \"import transformers as t; f = '{folder}'; "
        "getattr(t, t.AutoConfig.from_pretrained(f).architectures[0]).from_pretrained(f).save_pretrained(f + '-safe')\", "
        "and add the tokenizer's files."
    )


def read_limited(path: Path) -> bytes:
    """A JSON file's bytes. Raises UserError where it cannot be read or is too large."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    if len(content) > MAX_JSON_BYTES:
        raise UserError(f"{path}: more than {MAX_JSON_BYTES:,} bytes.")
    return content
