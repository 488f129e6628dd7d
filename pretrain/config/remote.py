"""How shards that are not on a local disk are reached, and where their chunks are kept on the node."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from parallel.layout import Problem
from pretrain.config.section import Section, meaning

UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class CacheConfig(Section):
    """The node's cache of chunks of remote shards, shared by its ranks and runs. Local shards are read in their place."""

    dir: str | None = meaning(
        None, "folder on a local disk of each node, its owner's alone; null: ~/.cache/pretrain/chunks"
    )
    size: str = meaning("16 GiB", "most that it ever holds, such as 500 MB or 2 TiB; the least recently used chunks go")

    def problems(self) -> Iterator[Problem]:
        if not _parsed(self.size):
            yield Problem("size", f"{self.size!r} is no size above 0", f"give a number and one of {', '.join(UNITS)}")

    @property
    def bytes(self) -> int:
        """Of `size`."""
        return _parsed(self.size)

    @property
    def folder(self) -> Path:
        """Of `dir`, or the default in the user's cache folder."""
        if self.dir is not None:
            return Path(self.dir).absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "pretrain" / "chunks"


class RemoteConfig(Section):
    """Reading shards at http://, https://, s3:// and gs:// addresses."""

    timeout_seconds: float = meaning(120.0, "after which a chunk cannot be had, all tries together", gt=0)
    retries: int = meaning(3, "further tries of a read that failed, was cut short or gave wrong bytes", ge=0, le=20)
    backoff_seconds: float = meaning(0.5, "before the first further try; doubles with each", ge=0)
    on_missing: Literal["stop", "pass"] = meaning(
        "stop",
        "where a chunk of training data cannot be had after all tries: stop, or pass over its samples, which then count "
        "nothing; metrics and checkpoints name it",
    )
    in_flight: int = meaning(16, "reads at a time of a process, ahead of the training loop", ge=1, le=64)
    allow_private: bool | list[str] = meaning(
        False, "whether host names may lead to private, loopback or link-local addresses; or a list of those that may"
    )
    endpoint: str | None = meaning(None, "address of an S3-compatible server for s3://; null: Amazon's")
    anonymous: bool = meaning(False, "read s3:// and gs:// without credentials, as public buckets allow")

    def problems(self) -> Iterator[Problem]:
        if self.endpoint is not None and not re.fullmatch(r"https?://[A-Za-z0-9._\[\]:-]+/?", self.endpoint):
            yield Problem(
                "endpoint", f"{self.endpoint!r} is no address of a server", "write https://HOST or http://HOST:PORT"
            )


def _parsed(size: str) -> int:
    """Bytes; 0 where it is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size)
    return int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
