"""A source behind a web server, and ways to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.remote import CacheConfig, RemoteConfig
from pretrain.data.remote.access import Access
from tests.pretrain.data.remote.servers import Fault, Files, serving

NewServer = Callable[..., Files]
NewAccess = Callable[..., Access]


@pytest.fixture
def serve() -> Iterator[NewServer]:
    """`serve(folder, fault)`: a server of a folder's files, ended when the test ends."""
    with ExitStack() as stack:

        def start(folder: Path, fault: Fault = lambda request, before: "") -> Files:
            return stack.enter_context(serving(Files(folder, fault)))

        yield start


@pytest.fixture
def new_access(tmp_path: Path) -> NewAccess:
    """`new_access(size, name, timeout_seconds=...)`: with a cache of the test's own and short waits."""

    def make(size: str = "1 MB", name: str = "cache", **remote: Any) -> Access:
        options = {"backoff_seconds": 0.01, "timeout_seconds": 20.0, **remote}
        return Access(CacheConfig(dir=str(tmp_path / name), size=size), RemoteConfig(**options))

    return make
