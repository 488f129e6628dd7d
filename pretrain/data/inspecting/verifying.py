"""Whether shards are, byte for byte, those that were written: every shard's SHA-256, every chunk's, every id.

Read once from first to last, a chunk in memory at a time. What is wrong is told and the next chunk or shard looked at, so
that one pass names all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pretrain.config.remote import CacheConfig
from pretrain.data import shards as layout
from pretrain.data.chunks import MEND, fault
from pretrain.data.manifest import Manifest, Shard
from pretrain.data.remote.access import Access, RemoteFolder
from pretrain.data.remote.chunks import open_chunks
from pretrain.errors import UserError

CACHE = "512 MiB"  # on disk, while chunks at an address are verified
PART = 1 << 16  # bytes of what is behind the last chunk, read at a time


def verify(manifest: Manifest, tell: Callable[[int], None] = lambda _: None) -> Iterator[str]:
    """What is wrong with the shards, a sentence each. tell: is given the bytes that were read since."""
    if isinstance(manifest.folder, RemoteFolder):
        yield from _elsewhere(manifest, manifest.folder, tell)
        return
    for number, shard in enumerate(manifest.shards):
        try:
            hashes = _sidecar(manifest, shard)
            with _open(manifest, shard.name, shard.bytes) as file:
                yield from _of_shard(manifest, number, file, hashes, tell)
        except UserError as error:
            yield str(error)


def _elsewhere(manifest: Manifest, source: RemoteFolder, tell: Callable[[int], None]) -> Iterator[str]:
    """Of a source at an address: every chunk as it is there now, so past the node's cache, which may hold it as it was. A
    shard's own SHA-256 would need it fetched whole."""
    with tempfile.TemporaryDirectory(prefix="verify-") as cache:
        access = Access(CacheConfig(dir=cache, size=CACHE), source.access.config)
        [chunks], ahead = open_chunks([dataclasses.replace(manifest, folder=access.folder(str(source)))])
        try:
            for chunk in range(manifest.chunks):
                try:
                    tell(chunks.tokens(chunk, 0, layout.chunk_values(chunk, manifest)).nbytes)
                except UserError as error:
                    yield str(error)
        finally:
            chunks.close()
            if ahead is not None:
                ahead.close()


def _of_shard(
    manifest: Manifest, number: int, file: IO[bytes], hashes: bytes, tell: Callable[[int], None]
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


def _read(file: IO[bytes], manifest: Manifest, shard: Shard, size: int) -> bytes:
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


def _open(manifest: Manifest, name: str, size: int) -> IO[bytes]:
    """A plain file of the recorded size, not a link to somewhere else. Raises UserError where it is none."""
    assert isinstance(manifest.folder, Path)
    path = manifest.folder / name
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise UserError(f"{path} is missing or unreadable: {error.strerror}. {MEND}") from error
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_size == size:
        return file
    file.close()
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is not a plain file. {MEND}")
    raise UserError(f"{path} has {found.st_size:,} bytes, not {size:,}. {MEND}")
