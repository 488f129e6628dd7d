"""A process that reads a source at an address: `python -m tests.pretrain.data.remote.reader OPTIONS`, in JSON. It prints a hash
of the tokens that it read."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np

from pretrain.config.remote import CacheConfig, RemoteConfig
from pretrain.data.remote import cache
from pretrain.data.remote.access import Access
from pretrain.data.stream import Stream


def main(url: str, folder: str, size: str, samples: list[int], times: int = 1, timeout: float = 20.0) -> None:
    """Read the samples so many times."""
    cache.FRESH_SECONDS = 0.0  # tests are short
    access = Access(CacheConfig(dir=folder, size=size), RemoteConfig(backoff_seconds=0.01, timeout_seconds=timeout))
    digest = hashlib.sha256()
    for _ in range(times):
        stream = Stream([access.folder(url)], 16, seed=1)
        stream._chunks[0]._keep = 1
        for part in np.array_split(np.array(samples), max(1, len(samples) // 8)):
            digest.update(stream.read(part).tobytes())
        stream.close()
    print(digest.hexdigest())


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
