"""How tokens lie in a shard, and the writer of a source's shards.

A source is one run of N tokens, an end-of-document id after each document, cut into chunks of C tokens. A chunk is one
member of a tar file, `00000000.tok` (numbered through the source): C tokens and one look-ahead token, so a sequence of
T tokens and its last target never need a second chunk. Only the source's last chunk may be short; it has no look-ahead,
as nothing follows its last token. Little-endian uint16, or uint32 for a vocabulary above 65,536.

Members are plain USTAR of one fixed header (no clock, no user), so member i of a shard begins at i x stride and its
header can be checked byte for byte without parsing it. Any tar program and a stock `webdataset.WebDataset` read the
shards.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pretrain.data.preparing.files import write_whole

BLOCK = tarfile.BLOCKSIZE
USER, GROUP, MODE = "pretrain", "pretrain", 0o444
CHUNKS_PER_SHARD = 512
TOKENS_PER_CHUNK = 1 << 19
LEAST_TOKENS_PER_CHUNK = 1 << 14
CHUNKS_AT_LEAST = 16  # a small corpus has smaller chunks, so that a wrong byte costs one of 16, not the whole


class Counts(Protocol):
    """What the arithmetic of a source needs of its manifest."""

    @property
    def tokens(self) -> int: ...
    @property
    def tokens_per_chunk(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...


def dtype_of(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"


def sidecar_name(number: int) -> str:
    return f"shard-{number:05d}.sha256"


def num_chunks(tokens: int, tokens_per_chunk: int) -> int:
    """Chunks of a source: its N tokens have N - 1 targets, C of them a chunk."""
    return -(-(tokens - 1) // tokens_per_chunk)


def chunk_values(chunk: int, source: Counts) -> int:
    """Number of values stored in a chunk: C + 1, or what is left for the last."""
    return min(source.tokens_per_chunk, source.tokens - 1 - chunk * source.tokens_per_chunk) + 1


def tokens_before(chunk: int, source: Counts) -> int:
    """Tokens before a chunk, each counted once (a look-ahead token belongs to the next chunk)."""
    return (
        source.tokens
        if chunk >= num_chunks(source.tokens, source.tokens_per_chunk)
        else chunk * source.tokens_per_chunk
    )


def padded(size: int) -> int:
    """Bytes of a member's header and its data, padded to blocks: the stride of members of this size."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def member_sizes(first: int, last: int, source: Counts) -> tuple[int, int, int]:
    """(members, bytes of each but the last, bytes of the last) of the chunks first to last - 1."""
    itemsize = source.dtype.itemsize
    return last - first, (source.tokens_per_chunk + 1) * itemsize, chunk_values(last - 1, source) * itemsize


def shard_bytes(members: tuple[int, int, int]) -> int:
    """Bytes of a tar file of these members: two zero blocks at the end, padded to a record."""
    count, size, last = members
    used = (count - 1) * padded(size) + padded(last) + 2 * BLOCK
    return -(-used // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def header(chunk: int, size: int) -> bytes:
    """The 512 bytes before a chunk's data."""
    member = tarfile.TarInfo(f"{chunk:08d}.tok")
    member.size, member.mtime, member.mode, member.uname, member.gname = size, 0, MODE, USER, GROUP
    return member.tobuf(tarfile.USTAR_FORMAT)


class Entry(NamedTuple):
    """What the manifest says of a shard, but for its tokens."""

    name: str
    bytes: int
    chunks: int
    sha256: str
    sidecar: str
    sidecar_sha256: str


Read = Callable[[int, int], Any]  # (start, count) of tokens in the source -> an array of the source's dtype


def num_shards(source: Counts, chunks_per_shard: int) -> int:
    return -(-num_chunks(source.tokens, source.tokens_per_chunk) // chunks_per_shard)


def write_shard(folder: Path, number: int, source: Counts, chunks_per_shard: int, read: Read) -> Entry:
    """Write one shard and its sidecar, which depend on no other: each appears when it is whole and on the disk.

    Written without webdataset, whose import is torch's, and hashed on the way: a second pass would miss the disk's rate.
    """
    first = number * chunks_per_shard
    last = min(first + chunks_per_shard, num_chunks(source.tokens, source.tokens_per_chunk))
    whole, hashes = hashlib.sha256(), bytearray()
    with write_whole(folder / shard_name(number)) as file:

        def put(data: Any) -> None:
            whole.update(data)
            file.write(data)

        for chunk in range(first, last):
            tokens = read(chunk * source.tokens_per_chunk, chunk_values(chunk, source))
            data = tokens.data.cast("B")
            hashes += hashlib.sha256(data).digest()
            put(header(chunk, data.nbytes))
            put(data)
            put(bytes(-data.nbytes % BLOCK))
        size = shard_bytes(member_sizes(first, last, source))
        put(bytes(size - file.tell()))
    with write_whole(folder / sidecar_name(number)) as file:
        file.write(hashes)
    sidecar = hashlib.sha256(hashes).hexdigest()
    return Entry(shard_name(number), size, last - first, whole.hexdigest(), sidecar_name(number), sidecar)


class ShardWriter:
    """Writes a source's tokens into shards of `folder`; `add` documents, then `finish`.

    tokens_per_chunk None: as `chunk_size` says. Tokens lie in a file until all are counted.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype[Any], tokens_per_chunk: int | None, chunks_per_shard: int, row: int = 1
    ) -> None:
        self.folder, self.dtype, self.row = folder, dtype, row
        self.tokens_per_chunk = tokens_per_chunk or 0
        self.chunks_per_shard = chunks_per_shard
        self.tokens = 0
        folder.mkdir()
        self._spool = open(folder / ".tokens", "w+b")  # noqa: SIM115 (until `finish`)

    def add(self, tokens: np.ndarray[Any, Any]) -> None:
        """Append tokens of the source's dtype."""
        self._spool.write(np.ascontiguousarray(tokens, self.dtype).data)
        self.tokens += len(tokens)

    def finish(self) -> list[dict[str, Any]]:
        """Write the shards. Returns the manifest's entry of each; needs at least two tokens."""
        self.tokens_per_chunk = self.tokens_per_chunk or chunk_size(self.tokens, self.row)
        self._spool.flush()
        numbers = range(num_shards(self, self.chunks_per_shard))
        entries = [write_shard(self.folder, number, self, self.chunks_per_shard, self._read) for number in numbers]
        self._spool.close()
        (self.folder / ".tokens").unlink()
        return [entry._asdict() for entry in entries]

    def _read(self, start: int, count: int) -> np.ndarray[Any, Any]:
        size = self.dtype.itemsize
        return np.frombuffer(os.pread(self._spool.fileno(), count * size, start * size), self.dtype)


def chunk_size(tokens: int, row: int = 1) -> int:
    """Tokens a chunk, where none were asked for: 2^19, or of a small corpus the largest power of two, at least 2^14, of
    which it has more than 16; rounded down to a multiple of `row`, the tokens that stay together."""
    size = TOKENS_PER_CHUNK
    while size > LEAST_TOKENS_PER_CHUNK and tokens <= CHUNKS_AT_LEAST * size:
        size //= 2
    return max(size // row, 1) * row
