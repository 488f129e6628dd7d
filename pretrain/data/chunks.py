"""Read tokens of a source's chunks, each verified before its first token is handed out.

A chunk's first use reads it whole: its tar header must be the one that `prepare` writes, byte for byte, its SHA-256 the
sidecar's (whose own is the manifest's), its ids below the vocabulary. Later uses read the sequence alone, or find the
chunk in a small cache. Nothing in a shard is parsed: a link, a sparse file, a compressed stream or a pickle is simply
not the expected header.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import stat
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data import shards as layout
from pretrain.data.manifest import Manifest, Shard
from pretrain.errors import UserError

OPEN_FILES = 64
CACHE_BYTES = 64 << 20
TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"x": "a pax header",
    b"g": "a pax header",
    b"S": "a sparse file",
}
MEND = "Restore the file from where it was prepared, or prepare the data again."


class _Open(NamedTuple):
    file: int  # descriptor
    hashes: bytes  # the sidecar


class Chunks:
    """The chunks of one source. Not safe for several threads at once; `close` when done."""

    def __init__(self, manifest: Manifest, cache_bytes: int = CACHE_BYTES) -> None:
        self.manifest = manifest
        self._stride = layout.padded((manifest.tokens_per_chunk + 1) * manifest.dtype.itemsize)
        self._firsts: list[int] = (
            manifest.first_chunks.tolist()
        )  # of integers bisect finds one in a fifth of numpy's time
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._verified = bytearray(manifest.chunks)
        self._cache: OrderedDict[int, np.ndarray[Any, Any]] = OrderedDict()
        self._keep = max(1, cache_bytes // self._stride)
        self._spare: np.ndarray[Any, Any] | None = None  # memory of a chunk that has left the cache
        self._reading: tuple[int, float] | None = None  # a chunk of which a file is read, and since when
        for number in range(len(manifest.shards)):
            self._check_shard(number)

    def tokens(self, chunk: int, first: int, count: int) -> np.ndarray[Any, Any]:
        """`count` values of a chunk from `first` on, in the source's dtype (do not write into them)."""
        if (held := self._cache.get(chunk)) is not None:
            self._cache.move_to_end(chunk)
            return held[first : first + count]
        if not self._verified[chunk]:
            return self._verify(chunk)[first : first + count]
        itemsize = self.manifest.dtype.itemsize
        data = self._part(chunk, first * itemsize, count * itemsize)
        if data is None:
            return self._verify(chunk)[first : first + count]
        return np.frombuffer(data, self.manifest.dtype)

    def close(self) -> None:
        """Close the open files."""
        while self._open:
            os.close(self._open.popitem()[1].file)

    def stalled(self, seconds: float) -> str:
        """A sentence where a read of a file has hung for so long, as on a network's disk whose server is gone; else empty.
        Asked by another thread than the one that reads."""
        reading = self._reading
        if reading is None or (hung := time.monotonic() - reading[1]) < seconds:
            return ""
        path = self.manifest.folder / self.shard_of(reading[0]).name
        return (
            f"{path}, chunk {reading[0]}: the disk has not answered for {hung:.0f} s. Look at what is mounted there; the "
            "same command goes on from the last checkpoint."
        )

    def shard_of(self, chunk: int) -> Shard:
        """The shard that holds a chunk."""
        return self.manifest.shards[self._place(chunk)[0]]

    def _place(self, chunk: int) -> tuple[int, int]:
        """(shard, the chunk's place in it)."""
        number = bisect.bisect_right(self._firsts, chunk) - 1
        return number, chunk - self._firsts[number]

    def _size(self, chunk: int) -> int:
        """Bytes of a chunk's data."""
        return layout.chunk_values(chunk, self.manifest) * self.manifest.dtype.itemsize

    def _verify(self, chunk: int) -> np.ndarray[Any, Any]:
        """All values of a chunk, read whole and checked."""
        number, index = self._place(chunk)
        data = self._read_whole(number, chunk, index * self._stride, layout.BLOCK + self._size(chunk))
        if fault := self._fault(chunk, data.data):
            self._refuse(number, chunk, fault)
        return self._keep_verified(chunk, data)

    def _fault(self, chunk: int, data: memoryview) -> str:
        """What is wrong with a whole chunk, its header before it; empty: nothing. This is where chunks are checked."""
        size, header, values = self._size(chunk), bytes(data[: layout.BLOCK]), data[layout.BLOCK :]
        if header != layout.header(chunk, size):
            return _difference(header, chunk, size)
        if hashlib.sha256(values).digest() != self._hash(chunk):
            return "its bytes were altered: the SHA-256 is not the recorded one"
        if (largest := int(np.frombuffer(values, self.manifest.dtype).max())) >= self.manifest.vocab_size:
            return f"it holds the id {largest}, and the vocabulary has {self.manifest.vocab_size}"
        return ""

    def _keep_verified(self, chunk: int, data: bytes | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        whole = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        tokens = whole[layout.BLOCK :].view(self.manifest.dtype)
        self._verified[chunk] = 1
        self._cache[chunk] = tokens
        if len(self._cache) > self._keep:
            self._spare = self._cache.popitem(last=False)[1].base
        return tokens

    def _read_whole(self, number: int, chunk: int, start: int, size: int) -> np.ndarray[Any, Any]:
        """`size` bytes of a shard, of a chunk and its header, as uint8; see `_read`. Into memory that was used before where
        there is some: the first touch of fresh memory costs more than the reading itself."""
        memory, self._spare = self._spare, None
        # Two references: this variable's and the call's. With more, someone has a view.
        if memory is None or not memory.flags.owndata or sys.getrefcount(memory) > 2:
            memory = np.empty(self._stride, np.uint8)
        data, done = memory[:size], 0
        self._reading = chunk, time.monotonic()
        try:
            file = self._opened(number).file
            while done < size and (more := os.preadv(file, [data[done:].data], start + done)):
                done += more
        except OSError as error:
            self._refuse(number, chunk, f"it cannot be read: {error.strerror}")
        finally:
            self._reading = None
        if done < size:
            self._refuse(number, chunk, "the file was cut short")
        return data

    def _hash(self, chunk: int) -> bytes:
        """The recorded SHA-256 of a chunk's data."""
        number, index = self._place(chunk)
        return self._opened(number).hashes[32 * index : 32 * index + 32]

    def _part(self, chunk: int, start: int, size: int) -> bytes | None:
        """`size` bytes of a verified chunk's data from `start` on; None where it must be read whole again."""
        number, index = self._place(chunk)
        return self._read(number, chunk, index * self._stride + layout.BLOCK + start, size)

    def _read(self, number: int, chunk: int, start: int, size: int) -> bytes:
        """`size` bytes of a shard; what a short read left out is asked for again, until the file's end."""
        self._reading = chunk, time.monotonic()
        try:
            file = self._opened(number).file
            data = os.pread(file, size, start)
            while len(data) < size and (more := os.pread(file, size - len(data), start + len(data))):
                data += more
        except OSError as error:
            self._refuse(number, chunk, f"it cannot be read: {error.strerror}")
        finally:
            self._reading = None
        if len(data) < size:
            self._refuse(number, chunk, "the file was cut short")
        return data

    def _opened(self, number: int) -> _Open:
        if (held := self._open.get(number)) is not None:
            self._open.move_to_end(number)
            return held
        shard = self.manifest.shards[number]
        self._check_shard(number)  # again: the file may have changed since the start
        sidecar = self._open_file(shard.sidecar)
        try:
            hashes = os.pread(sidecar, 32 * shard.chunks, 0)
        finally:
            os.close(sidecar)
        if hashlib.sha256(hashes).hexdigest() != shard.sidecar_sha256:
            raise UserError(f"{self.manifest.folder / shard.sidecar} (the hashes of {shard.name}) was altered. {MEND}")
        if len(self._open) == OPEN_FILES:
            os.close(self._open.popitem(last=False)[1].file)
        self._open[number] = _Open(self._open_file(shard.name), hashes)
        return self._open[number]

    def _path(self, name: str) -> Path:
        assert isinstance(self.manifest.folder, Path), "chunks at an address are RemoteChunks"
        return self.manifest.folder / name

    def _open_file(self, name: str) -> int:
        try:
            return os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"Cannot open {self._path(name)}: {error.strerror}.") from error

    def _check_file(self, name: str, size: int) -> None:
        """A plain file of the recorded size, not a link to somewhere else."""
        path = self._path(name)
        try:
            found = os.lstat(path)
        except OSError as error:
            raise UserError(f"{path} is missing or unreadable: {error.strerror}. {MEND}") from error
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is not a plain file (links are not followed). {MEND}")
        if found.st_size != size:
            what = "was cut short" if found.st_size < size else "is too long"
            raise UserError(f"{path} {what}: it has {found.st_size:,} bytes, not {size:,}. {MEND}")

    def _check_shard(self, number: int) -> None:
        """The shard's file and its sidecar. A cut names the first chunk that is not whole."""
        shard = self.manifest.shards[number]
        try:
            self._check_file(shard.name, shard.bytes)
        except UserError as error:
            path = self._path(shard.name)
            whole = path.lstat().st_size // self._stride if path.is_file() else 0
            if whole < shard.chunks:
                raise UserError(f"Chunk {int(self.manifest.first_chunks[number]) + whole}: {error}") from error
            raise
        self._check_file(shard.sidecar, 32 * shard.chunks)

    def _refuse(self, number: int, chunk: int, why: str) -> None:
        path = self.manifest.folder / self.manifest.shards[number].name
        raise UserError(f"{path}, chunk {chunk}: {why}. {MEND}")


def _difference(header: bytes, chunk: int, size: int) -> str:
    """Why a member's header is not the expected one: words for the message, the only use of these untrusted bytes."""
    name = header[:100].rstrip(b"\0").decode("ascii", "backslashreplace")
    if header.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh")):
        return "the file is compressed, not a plain tar"
    if header[257:262] != b"ustar":
        return "there is no tar header where the chunk begins"
    if header[156:157] in TYPES:
        return f"the member is {TYPES[header[156:157]]}, not a plain file"
    if name != f"{chunk:08d}.tok":
        return f"the member is named {name!r}, not '{chunk:08d}.tok' (another shard's, or no array of tokens)"
    if header[124:136] != layout.header(chunk, size)[124:136]:
        return f"the member's size is not {size} bytes"
    return "the member's header is not the one that was written"
