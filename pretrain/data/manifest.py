"""A source's manifest: what its shards hold, with counts and SHA-256 of everything.

    FOLDER/manifest.json      canonical JSON; its SHA-256 is the source's fingerprint
    FOLDER/tokenizer.model    the tokenizer of its ids, or tokenizer.json
    FOLDER/shard-00000.tar    chunks of tokens, see `pretrain.data.shards`
    FOLDER/shard-00000.sha256 the SHA-256 of every chunk of that shard, 32 bytes each

Everything read here may come from elsewhere: sizes are bounded before anything is parsed, every field is checked, and
all that follows from other fields (names, sizes, chunk counts) must be what `prepare` would have written.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data import shards as layout
from pretrain.data.remote.access import Access, RemoteFolder
from pretrain.data.remote.addresses import Address
from pretrain.errors import UserError
from pretrain.tokenization.base import MAX_BYTES as MAX_TOKENIZER_BYTES
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import FILES, load_tokenizer, open_tokenizer

FORMAT = "pretrain tokens"
VERSION = 3
NAME = "manifest.json"
CONCATENATED = "concat"  # text; packed pairs are "pairs SOURCE TARGET", from version 3 on
FILE_OF_VERSION_1 = "tokenizer.model"  # which knew no other
MAX_BYTES = 32 << 20  # ten trillion tokens are 37,000 shards: 13 MB
MAX_SHARDS = 1 << 17
MAX_TOKENS_PER_CHUNK = 1 << 24
MAX_TOKENS = 1 << 56
MAX_CHUNKS = 1 << 26  # 35 trillion tokens at 2^19 a chunk; a reader keeps a byte for each
MAX_CHUNKS_OF_SHARD = 1 << 20  # a reader holds their hashes: 32 MiB


@dataclass(frozen=True)
class Shard:
    """One tar file: `chunks` members; `tokens` counts each token of the source once (no look-ahead)."""

    name: str
    bytes: int
    chunks: int
    tokens: int
    sha256: str
    sidecar: str
    sidecar_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A source of tokens in `folder`, here or at an address. `fingerprint` is the SHA-256 of the manifest file."""

    folder: Path | RemoteFolder
    fingerprint: str
    dtype: np.dtype[Any]  # little-endian uint16 or uint32
    tokens_per_chunk: int  # without the one look-ahead token
    vocab_size: int
    tokenizer_file: str
    tokenizer_sha256: str
    special: dict[str, int]
    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[Shard, ...]
    pairs: tuple[int, int] | None = None  # of packed pairs, tokens of a row's sources and targets
    version: int = VERSION  # of the format that it was written in

    @property
    def eos(self) -> int:
        """The id after each document."""
        return self.special["eos"]

    @property
    def tokenizer_path(self) -> Path | Address:
        return self.folder / self.tokenizer_file

    @property
    def chunks(self) -> int:
        return layout.num_chunks(self.tokens, self.tokens_per_chunk)

    @cached_property
    def first_chunks(self) -> np.ndarray[Any, Any]:
        """(shards + 1,) int64: the number of each shard's first chunk, and the number of chunks."""
        return np.cumsum([0, *(shard.chunks for shard in self.shards)], dtype=np.int64)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the shards. Raises UserError if its ids are not those that the manifest tells of."""
        if isinstance(self.folder, RemoteFolder):
            content = _remote_tokenizer(self, self.folder)
            tokenizer = open_tokenizer(self.tokenizer_file, content, str(self.tokenizer_path))
        else:
            tokenizer = load_tokenizer(self.folder / self.tokenizer_file)
        if (tokenizer.vocab_size, tokenizer.special) != (self.vocab_size, self.special):
            raise UserError(
                f"{self.folder / NAME} was edited: its vocabulary and special ids are not those of "
                f"{self.tokenizer_path}. Prepare the data again."
            )
        return tokenizer

    @classmethod
    def load(cls, folder: str | Path | RemoteFolder) -> Manifest:
        """Read and check a source's manifest and its tokenizer's hash. The name of a folder may be an address, which is
        then read with the defaults of `pretrain.config.remote`. Raises UserError with what is wrong."""
        if not isinstance(folder, RemoteFolder):
            folder = Access().folder(folder)
        raw = _read(folder)
        try:
            manifest = _checked(folder, raw)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{folder / NAME} is damaged or not a manifest: {error}. Prepare the data again."
            ) from error
        _check_tokenizer(manifest)
        return manifest


def canonical(value: Any) -> bytes:
    """The one way of writing a value as JSON, so that equal values have equal hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _read(folder: Path | RemoteFolder) -> bytes:
    raw = folder.index(NAME, MAX_BYTES) if isinstance(folder, RemoteFolder) else _read_file(folder)
    # Bounds before parsing: a manifest has one list and one object a shard, so depth and memory are bounded by
    # counting.
    if (
        len(raw) > MAX_BYTES
        or raw.count(b"[") > 1
        or raw.count(b"{") > MAX_SHARDS + 3
        or raw.count(b",") > 8 * (MAX_SHARDS + 9)
    ):
        raise UserError(f"{folder / NAME} is not a manifest: it is larger than any manifest can be.")
    return raw


def _read_file(folder: Path) -> bytes:
    path = folder / NAME
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} with prepared shards: make it with `pretrain prepare`.")
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(
            f"The index {path} is missing: this is no folder of prepared shards, or it is incomplete."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read the index {path}: {error.strerror}.") from error


def _checked(folder: Path | RemoteFolder, raw: bytes) -> Manifest:
    """The manifest of the bytes. Raises ValueError, KeyError or TypeError for whatever is not as it must be."""
    value = json.loads(raw)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"it does not say that its format is {FORMAT!r}")
    version = value.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(f"{folder / NAME} has version {version}; this program reads versions 1 to {VERSION}.")
    if canonical(value) != raw:
        raise ValueError("it was edited: it is not in canonical form")
    tokenizer, special = value["tokenizer"], value["special"]
    vocab_size = _integer(value, "vocab_size", 1, 1 << 31)
    file = FILE_OF_VERSION_1 if version == 1 else tokenizer["file"]
    if file not in FILES or not all(isinstance(name, str) for name in special):
        raise ValueError("tokenizer or special ids")
    manifest = Manifest(
        folder=folder,
        fingerprint=hashlib.sha256(raw).hexdigest(),
        dtype=layout.dtype_of(vocab_size),
        tokens_per_chunk=_integer(value, "tokens_per_chunk", 1, MAX_TOKENS_PER_CHUNK),
        vocab_size=vocab_size,
        tokenizer_file=file,
        tokenizer_sha256=_hash(tokenizer, "sha256"),
        special={name: _integer(special, name, 0, vocab_size - 1) for name in special},
        documents=_integer(value, "documents", 1, MAX_TOKENS),
        tokens=_integer(value, "tokens", 2, MAX_TOKENS),
        text_bytes=_integer(value, "text_bytes", 0, MAX_TOKENS),
        shards=tuple(_shard(item) for item in value["shards"]),
        pairs=_pairs(value["packing"], version),
        version=version,
    )
    if "eos" not in manifest.special or canonical(describe(manifest)) != raw:  # bytes: true would equal 1
        raise ValueError("its fields are not those of a manifest")
    if manifest.chunks > MAX_CHUNKS:
        raise ValueError(f"{manifest.chunks:,} chunks are more than the {MAX_CHUNKS:,} that can be read")
    _check_shards(manifest)
    return manifest


def describe(manifest: Manifest) -> dict[str, Any]:
    """The manifest as the JSON value that is written: the only place that knows its fields' names."""
    tokenizer = {"file": manifest.tokenizer_file, "sha256": manifest.tokenizer_sha256}
    if manifest.version == 1:
        del tokenizer["file"]
    return {
        "format": FORMAT,
        "version": manifest.version,
        "dtype": manifest.dtype.name,
        "packing": CONCATENATED if manifest.pairs is None else "pairs {} {}".format(*manifest.pairs),
        "tokens_per_chunk": manifest.tokens_per_chunk,
        "vocab_size": manifest.vocab_size,
        "tokenizer": tokenizer,
        "special": manifest.special,
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "text_bytes": manifest.text_bytes,
        "chunks": manifest.chunks,
        "shards": [vars(shard) for shard in manifest.shards],
    }


def _pairs(packing: Any, version: int) -> tuple[int, int] | None:
    if packing == CONCATENATED:
        return None
    found = re.fullmatch(r"pairs ([1-9]\d{0,7}) ([1-9]\d{0,7})", packing)
    if found is None or version < 3:
        raise ValueError("its packing is not known")
    return int(found[1]), int(found[2])


def _shard(item: dict[str, Any]) -> Shard:
    return Shard(
        name=item["name"],
        bytes=_integer(item, "bytes", 1, MAX_TOKENS),
        chunks=_integer(item, "chunks", 1, MAX_CHUNKS_OF_SHARD),
        tokens=_integer(item, "tokens", 1, MAX_TOKENS),
        sha256=_hash(item, "sha256"),
        sidecar=item["sidecar"],
        sidecar_sha256=_hash(item, "sidecar_sha256"),
    )


def _check_shards(manifest: Manifest) -> None:
    """Names, sizes and counts follow from the number of tokens; anything else is refused before a file is opened."""
    first = 0
    for number, shard in enumerate(manifest.shards):
        if (shard.name, shard.sidecar) != (layout.shard_name(number), layout.sidecar_name(number)):
            raise ValueError(f"shard {number} must be named {layout.shard_name(number)}, not {shard.name!r}")
        last = min(first + shard.chunks, manifest.chunks)
        tokens = layout.tokens_before(last, manifest) - layout.tokens_before(first, manifest)
        members = layout.member_sizes(first, last, manifest)
        if (shard.chunks, shard.tokens, shard.bytes) != (last - first, tokens, layout.shard_bytes(members)):
            raise ValueError(f"the counts of {shard.name} do not add up")
        first = last
    if first != manifest.chunks:
        raise ValueError(f"its shards hold {first} chunks of {manifest.chunks}")


def _integer(value: dict[str, Any], name: str, low: int, high: int) -> int:
    number = value[name]
    if type(number) is not int or not low <= number <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}")
    return number


def _hash(value: dict[str, Any], name: str) -> str:
    text = value[name]
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(f"{name} must be a SHA-256")
    return text


def _remote_tokenizer(manifest: Manifest, folder: RemoteFolder) -> bytes:
    return folder.file(manifest.fingerprint, manifest.tokenizer_file, manifest.tokenizer_sha256, MAX_TOKENIZER_BYTES)


def _check_tokenizer(manifest: Manifest) -> None:
    if isinstance(manifest.folder, RemoteFolder):
        _remote_tokenizer(manifest, manifest.folder)
        return
    path = manifest.folder / manifest.tokenizer_file
    try:
        with open(path, "rb") as file:
            found = hashlib.sha256(file.read(MAX_TOKENIZER_BYTES)).hexdigest()
    except OSError as error:
        raise UserError(f"The tokenizer {path} is missing or unreadable: {error.strerror}.") from error
    if found != manifest.tokenizer_sha256:
        raise UserError(
            f"{path} is not the tokenizer of these shards (SHA-256 {found[:12]}, expected "
            f"{manifest.tokenizer_sha256[:12]}): put back the one that prepare wrote, or prepare the data again."
        )
