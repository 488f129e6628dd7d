"""Files of a work folder: each is there whole or not at all, also when two processes write the same at once."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def write_whole(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write, which takes the place of `path` when it is complete and on the disk; removed on an exception."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(3)}")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """The value, whole."""
    with write_whole(path) as file:
        file.write(json.dumps(value, separators=(",", ":")).encode())


def read_json(path: Path) -> Any:
    """The value; None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
