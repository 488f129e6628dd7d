"""Whether shards are, byte for byte, those that were written: every shard's SHA-256, every chunk's, every id.

Read once from first to last, a chunk in memory at a time. What is wrong is told and the next chunk or shard looked at, so
that one pass names all of it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.data import shards as layout
from pretrain.data.chunks import MEND, fault
from pretrain.data.manifest import Manifest, Shard
from pretrain.errors import UserError

PART = 1 << 16  # bytes of what is behind the last chunk, read at a time


def verify(manifest: Manifest, tell: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """What is wrong with the shards, a sentence each. tell: is given the bytes that were read since."""
    for number, shard in enumerate(manifest.shards):
        try:
            hashes = _sidecar(manifest, shard)
            with _open(manifest, shard.name, shard.bytes) as file:
                yield from _of_shard(manifest, number, file, hashes, tell)
        except UserError as error:
            yield str(error)


def _of_shard(
    manifest: Manifest, number: int, file: BinaryIO, hashes: bytes, tell: Callable[[int], None]
) -> Iterator[str]:
    shard, first = manifest.shards[number], int(manifest.first_chunks[number])
    path, whole = manifest.folder / shard.name, hashlib.sha256()
    for index in range(shard.chunks):
        size = layout.chunk_values(first + index, manifest) * manifest.dtype.itemsize
        data = _read(file, manifest, shard, layout.padded(size))
        whole.update(data)
        tell(len(data))
        values = memoryview(data)[: layout.BLOCK + size]
        if why := fault(manifest, first + index, values, hashes[32 * index : 32 * index + 32]):
            yield f"{path}, chunk {first + index}: {why}."
    while data := _read(file, manifest, shard, PART):
        whole.update(data)
        tell(len(data))
    if whole.hexdigest() != shard.sha256:
        yield f"{path}: its SHA-256 is {whole.hexdigest()[:16]}, and the manifest's {shard.sha256[:16]}."


def _read(file: BinaryIO, manifest: Manifest, shard: Shard, size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise UserError(f"{manifest.folder / shard.name} cannot be read: {error.strerror}. {MEND}") from error


def _sidecar(manifest: Manifest, shard: Shard) -> bytes:
    """The hashes of the shard's chunks. Raises UserError unless they are the manifest's."""
    with _open(manifest, shard.sidecar, 32 * shard.chunks) as file:
        hashes = _read(file, manifest, shard, 32 * shard.chunks)
    if hashlib.sha256(hashes).hexdigest() != shard.sidecar_sha256:
        raise UserError(f"{manifest.folder / shard.sidecar} (the hashes of {shard.name}) was altered. {MEND}")
    return hashes


def _open(manifest: Manifest, name: str, size: int) -> BinaryIO:
    """A plain file of the recorded size, not a link to somewhere else. Raises UserError where it is none."""
    if not isinstance(manifest.folder, Path):
        raise UserError(
            f"{manifest.folder}: --verify reads folders of this machine; a run checks each chunk as it comes."
        )
    path = manifest.folder / name
    try:
        file: BinaryIO = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise UserError(f"{path} is missing or unreadable: {error.strerror}. {MEND}") from error
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size == size:
        return file
    file.close()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a plain file. {MEND}")
    raise UserError(f"{path} has {found.st_size:,} bytes, not {size:,}. {MEND}")
