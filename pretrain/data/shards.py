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
from pathlib import Path
from typing import Any, Protocol

import numpy as np

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


class _HashingFile:
    """A file that hashes what it writes: a second pass over the shard would miss the disk's rate."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("xb")
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class ShardWriter:
    """Writes a source's tokens into shards of `folder`; `add` documents, then `finish`.

    tokens_per_chunk None: C is 2^19, or for a small corpus the power of two that makes at least 16 chunks, rounded down to
    a multiple of `row`, the tokens that stay together. The first 16 x 2^19 tokens are therefore kept in memory before
    anything is written.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype[Any], tokens_per_chunk: int | None, chunks_per_shard: int, row: int = 1
    ) -> None:
        self.folder, self.dtype, self.row = folder, dtype, row
        self.tokens_per_chunk = tokens_per_chunk or 0
        self.chunks_per_shard = chunks_per_shard
        self.tokens = 0
        self.shards: list[dict[str, Any]] = []
        self._waiting: list[np.ndarray[Any, Any]] = []
        self._num_waiting = self._chunk = 0
        self._file: _HashingFile | None = None
        self._tar: Any = None
        self._hashes = b""
        folder.mkdir()

    def add(self, tokens: np.ndarray[Any, Any]) -> None:
        """Append tokens of the source's dtype."""
        self._waiting.append(tokens)
        self._num_waiting += len(tokens)
        self.tokens += len(tokens)
        if not self.tokens_per_chunk and self._num_waiting > CHUNKS_AT_LEAST * TOKENS_PER_CHUNK:
            self.tokens_per_chunk = self._rows(TOKENS_PER_CHUNK)
        if self.tokens_per_chunk and self._num_waiting > self.tokens_per_chunk:
            self._write_chunks()

    def finish(self) -> list[dict[str, Any]]:
        """Write what is left. Returns the manifest's entry of each shard; needs at least two tokens."""
        if not self.tokens_per_chunk:
            self.tokens_per_chunk = self._rows(_small_chunk(self.tokens))
        self._write_chunks()
        if self._num_waiting > 1:
            self._write_chunk(self._joined())
        self._close_shard()
        return self.shards

    def _rows(self, tokens: int) -> int:
        return max(tokens // self.row, 1) * self.row

    def _joined(self) -> np.ndarray[Any, Any]:
        if len(self._waiting) > 1:
            self._waiting = [np.concatenate(self._waiting)]
        return self._waiting[0]

    def _write_chunks(self) -> None:
        """Write every whole chunk of the waiting tokens: C and a look-ahead that stays as the next chunk's first."""
        tokens, size, start = self._joined(), self.tokens_per_chunk, 0
        while len(tokens) - start > size:
            self._write_chunk(tokens[start : start + size + 1])
            start += size
        self._waiting = [tokens[start:].copy()]
        self._num_waiting = len(self._waiting[0])

    def _write_chunk(self, tokens: np.ndarray[Any, Any]) -> None:
        if self._tar is None:
            self._open_shard()
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self._tar.write({"__key__": f"{self._chunk:08d}", "tok": data})
        self._hashes += hashlib.sha256(data).digest()
        self._chunk += 1
        if len(self._hashes) == 32 * self.chunks_per_shard:
            self._close_shard()

    def _open_shard(self) -> None:
        from webdataset.writer import TarWriter  # imports torch: seconds, and only who writes shards pays them

        self._file = _HashingFile(self.folder / shard_name(len(self.shards)))
        self._tar = TarWriter(self._file, encoder=False, mtime=0, user=USER, group=GROUP, mode=MODE, compress=False)

    def _close_shard(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.close()
        number = len(self.shards)
        sidecar = _HashingFile(self.folder / sidecar_name(number))
        sidecar.write(self._hashes)
        sidecar.close()
        self.shards.append(
            {
                "name": shard_name(number),
                "bytes": self._file.size,
                "chunks": len(self._hashes) // 32,
                "sha256": self._file.sha256.hexdigest(),
                "sidecar": sidecar_name(number),
                "sidecar_sha256": sidecar.sha256.hexdigest(),
            }
        )
        self._tar = self._file = None
        self._hashes = b""


def _small_chunk(tokens: int) -> int:
    """The largest power of two of which there are at least 16 in the tokens, at least 2^14."""
    size = TOKENS_PER_CHUNK
    while size > LEAST_TOKENS_PER_CHUNK and tokens <= CHUNKS_AT_LEAST * size:
        size //= 2
    return size
