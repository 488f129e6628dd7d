"""Tars as others write them, well and badly."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

Members = Iterable[tuple[str, bytes]]


def packed(members: Members, tar_format: int = tarfile.USTAR_FORMAT, end: bool = True, **fields: object) -> bytes:
    """A tar's bytes; `fields` are put on every member. end=False: without the blocks of zeros that end it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
        size = file.tell()
    return file.getvalue() if end else file.getvalue()[:size]


def raw_header(name: str = "a.txt", size: bytes = b"00000000005\0", kind: bytes = b"0", magic: bytes = b"") -> bytes:
    """A header with any size field, of which the checksum is right."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136], header[156:157] = size, kind
    header[257:265] = magic or header[257:265]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def member(data: bytes = b"text\n", **header: object) -> bytes:
    """A whole member with such a header."""
    return raw_header(**header) + data + bytes(-len(data) % 512)  # type: ignore[arg-type]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
