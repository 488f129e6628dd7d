"""Open a text file whatever its compression (by suffix: .gz, .zst or none), and notice a stream that is cut short."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, Any, cast

import zstandard

SUFFIXES = (".gz", ".zst")
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
FEED = 512  # compressed bytes a call: a block of 4 may stand for 128 KiB, so this bounds a bomb's memory to 16 MiB


def open_bytes(path: Path) -> IO[bytes]:
    """A buffered binary stream of the file's text. Reading raises one of DAMAGED where the compression is broken."""
    suffix = path.suffix.lower()
    if suffix in (".gz", ".tgz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if suffix == ".zst":
        return io.BufferedReader(_ZstandardFile(path), 1 << 18)
    return open(path, "rb")


class _ZstandardFile(io.RawIOBase):
    """zstandard's own reader takes a file cut inside a frame for a complete one; this one raises EOFError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = self._new_frame()
        self._inside = False
        self._compressed = b""
        self._text = memoryview(b"")

    @staticmethod
    def _new_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or self._file.read(FEED)
            if not self._compressed:
                if self._inside:
                    raise EOFError("the compressed stream is cut short")
                return 0
            self._text = memoryview(self._frame.decompress(self._compressed))
            self._inside, self._compressed = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = self._new_frame()
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
