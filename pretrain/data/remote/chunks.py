"""Chunks of a source at an address: as `pretrain.data.chunks`, which checks each, with bytes from the node's cache.

A chunk is one file in the cache, header and data as in the shard, fetched by one ranged read of that member alone.
It is checked before it comes into the cache, and again when a process first reads it there (by a short hash where it is this
process that has checked and written it); one that went bad on the disk is fetched again, once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash

from pretrain.data import shards as layout
from pretrain.data.chunks import CACHE_BYTES, Chunks
from pretrain.data.manifest import Manifest
from pretrain.data.remote.access import RemoteFolder
from pretrain.data.remote.ahead import Ahead
from pretrain.errors import UserError

SIDECARS = 256  # kept in memory: 16 KiB each, of which a shard's chunks come in any order
AHEAD_BYTES = 256 << 20
AHEAD_SHARE = 8  # of the cache, at most, is what was fetched and not yet read: several ranks share it


class RemoteChunks(Chunks):
    """The chunks of one source at an address."""

    def __init__(self, manifest: Manifest, folder: RemoteFolder, ahead: Ahead, cache_bytes: int = CACHE_BYTES) -> None:
        self.folder, self.ahead = folder, ahead
        self._hashes: OrderedDict[int, bytes] = OrderedDict()
        self._checked: dict[int, int] = {}  # a short hash of chunks that were checked here before they were written
        self._lock = threading.Lock()
        super().__init__(manifest, cache_bytes)
        if folder.access.cache.size < 2 * self._stride:
            raise UserError(
                f"data.cache.size: {folder.access.cache.size:,} bytes do not hold two chunks of {folder}, "
                f"{self._stride:,} bytes each; raise it."
            )

    @property
    def chunk_bytes(self) -> int:
        return self._stride

    def fetch_ahead(self, chunk: int) -> None:
        """Have the chunk in the cache. Raises UserError."""
        key = self._key(chunk)
        if not self.folder.access.cache.holds(key) and (data := self._fill(chunk)) is not None:
            self._checked[chunk] = xxhash.xxh3_64_intdigest(data)

    def is_at_hand(self, chunk: int) -> bool:
        """Whether it need not be fetched; asking counts as a use, so that it stays."""
        return chunk in self._cache or self.folder.access.cache.holds(self._key(chunk))

    # -- what is otherwise done with files ---------------------------------------------------------------------------

    def _check_shard(self, number: int) -> None:
        """Nothing: to ask for the size of each of thousands of shards would hold up the start. What is missing or short
        is told by the first chunk that needs it."""

    def _verify(self, chunk: int) -> np.ndarray[Any, Any]:
        try:
            self.ahead.wait((self, chunk))
            data = self._held(chunk) or self._fetched(chunk)
            return self._keep_verified(chunk, np.frombuffer(data, self.manifest.dtype, offset=layout.BLOCK))
        finally:
            self.ahead.read((self, chunk))

    def _part(self, chunk: int, start: int, size: int) -> bytes | None:
        data = self.folder.access.cache.read(self._key(chunk), layout.BLOCK + start, size)
        return data if data is not None and len(data) == size else None

    def _hash(self, chunk: int) -> bytes:
        number, index = self._place(chunk)
        with self._lock:
            hashes = self._hashes.get(number)
        if hashes is None:
            shard = self.manifest.shards[number]
            hashes = self.folder.file(self.manifest.fingerprint, shard.sidecar, shard.sidecar_sha256, 32 * shard.chunks)
            with self._lock:
                self._hashes[number] = hashes
                if len(self._hashes) > SIDECARS:
                    self._hashes.popitem(last=False)
        return hashes[32 * index : 32 * index + 32]

    # -- the cache ---------------------------------------------------------------------------------------------------

    def _key(self, chunk: int) -> tuple[str, str]:
        return self.manifest.fingerprint, f"chunk-{chunk:08d}"

    def _held(self, chunk: int) -> bytes | None:
        """The chunk as it lies in the cache, checked; one that is not as it should be is removed there."""
        cache, key = self.folder.access.cache, self._key(chunk)
        data = cache.read(key, 0, layout.BLOCK + self._size(chunk))
        if data is None or self._is_as_written(chunk, data) or not self._wrong(chunk, data):
            return data
        cache.remove(key)
        return None

    def _is_as_written(self, chunk: int, data: bytes) -> bool:
        """Whether these are the bytes that this process has checked and written: what a disk did to them since shows in a
        hash that costs a thirtieth of SHA-256."""
        return self._checked.pop(chunk, None) == xxhash.xxh3_64_intdigest(data)

    def _fetched(self, chunk: int) -> bytes:
        data = self._fill(chunk)
        if data is None:  # by another thread or process
            data = self._held(chunk)
        return self._fetch(chunk) if data is None else data  # already gone again: the cache is small

    def _fill(self, chunk: int) -> bytes | None:
        access = self.folder.access
        return access.cache.fill(self._key(chunk), lambda: self._fetch(chunk), access.config.timeout_seconds)

    def _fetch(self, chunk: int) -> bytes:
        number, index = self._place(chunk)
        shard = self.folder / self.manifest.shards[number].name
        start, size = index * self._stride, layout.BLOCK + self._size(chunk)
        self._hash(chunk)  # first, for the chunk's time is its own
        return self.folder.access.fetcher.fetch(
            shard, start, size, lambda data: self._wrong(chunk, data), f"{shard}, chunk {chunk}"
        )

    def _wrong(self, chunk: int, data: bytes) -> str:
        """What is wrong with a chunk's bytes; empty: nothing."""
        size = layout.BLOCK + self._size(chunk)
        return f"{len(data):,} bytes came of {size:,}" if len(data) < size else self._fault(chunk, memoryview(data))


def cache_shortage(sources: Sequence[Chunks], open_chunks: int) -> list[str]:
    """A sentence where the cache does not hold the chunks that an order has open at a time, so many of each source."""
    remote = [chunks for chunks in sources if isinstance(chunks, RemoteChunks)]
    wanted = sum(min(open_chunks, chunks.manifest.chunks) * chunks.chunk_bytes for chunks in remote)
    if not remote or (size := remote[0].folder.access.cache.size) >= wanted:
        return []
    return [
        f"warning: data.cache.size: {size / 2**20:,.1f} MiB hold less than the {wanted / 2**20:,.1f} MiB of chunks that the "
        "shuffle has open at a time, so that some are fetched again and again; raise it, or lower data.window in a new run"
    ]


def open_chunks(manifests: Sequence[Manifest], cache_bytes: int = CACHE_BYTES) -> tuple[list[Chunks], Ahead | None]:
    """The chunks of each source, and what fetches ahead those of remote ones (None where all are local). Raises UserError."""
    folders = [manifest.folder for manifest in manifests if isinstance(manifest.folder, RemoteFolder)]
    if not folders:
        return [Chunks(manifest, cache_bytes) for manifest in manifests], None
    access = folders[0].access
    ahead = Ahead(access.config.in_flight, min(AHEAD_BYTES, access.cache.size // AHEAD_SHARE))
    return [
        RemoteChunks(manifest, manifest.folder, ahead, cache_bytes)
        if isinstance(manifest.folder, RemoteFolder)
        else Chunks(manifest, cache_bytes)
        for manifest in manifests
    ], ahead
