"""Folders of shards at an address: which they are, and how their files are had."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pretrain.config.remote import CacheConfig, RemoteConfig
from pretrain.data.remote.addresses import Address, parse_address
from pretrain.data.remote.cache import Cache
from pretrain.data.remote.fetching import Fetcher


class Access:
    """The way to remote folders that a configuration allows. Nothing is opened or written before it is needed."""

    def __init__(self, cache: CacheConfig | None = None, remote: RemoteConfig | None = None) -> None:
        self._cache = cache or CacheConfig()
        self.config = remote or RemoteConfig()
        self.fetcher = Fetcher(self.config)

    @cached_property
    def cache(self) -> Cache:
        """Raises UserError where its folder cannot be used."""
        return Cache(self._cache.folder, self._cache.bytes)

    def folder(self, name: str | Path) -> Path | RemoteFolder:
        """The folder of that name, here or elsewhere. Raises UserError for an address that is not read."""
        path = Path(name)
        if "://" not in str(name) and path.exists():  # a folder here may be called what looks like an address
            return path
        address = parse_address(str(name))
        return path if address is None else RemoteFolder(address, self)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of shards at an address. Two of them are one folder where the address is the same."""

    address: Address
    access: Access = field(compare=False, repr=False)
    _kept: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.address)

    def __truediv__(self, name: str) -> Address:
        return self.address / name

    def index(self, name: str, limit: int) -> bytes:
        """The file that says what the others are, at most `limit` + 1 bytes of it. Asked for once a process: what follows
        from it must not change under a run. Raises UserError."""
        with self._lock:
            if name not in self._kept:
                self._kept[name] = self.access.fetcher.fetch(
                    self / name, 0, limit + 1, lambda data: "" if data else "it is empty", str(self / name)
                )
            return self._kept[name]

    def file(self, fingerprint: str, name: str, sha256: str, limit: int) -> bytes:
        """A small file of known hash, from the cache or into it. Raises UserError."""
        key, cache = (fingerprint, name), self.access.cache

        def wrong(data: bytes) -> str:
            if hashlib.sha256(data).hexdigest() == sha256:
                return ""
            return "its bytes were altered: the SHA-256 is not the recorded one"

        def fetch() -> bytes:
            return self.access.fetcher.fetch(self / name, 0, limit + 1, wrong, str(self / name))

        if (held := cache.read(key, 0, limit + 1)) is not None and not wrong(held):
            return held
        if held is not None:
            cache.remove(key)
        data = cache.fill(key, fetch, self.access.config.timeout_seconds)
        if data is None and ((data := cache.read(key, 0, limit + 1)) is None or wrong(data)):
            data = fetch()  # another process filled it, and it has gone since
        return data
