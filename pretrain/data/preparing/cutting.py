"""Where a large file is cut: at the first line, or paragraph, that begins at or after each multiple of a size.

A cut is found by reading a little behind its multiple, so that it depends on nothing else. How many lines lie before it is
counted in one pass over the file, so that a document is named by its line wherever the file is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pretrain.data.documents import TextFile

READ = 1 << 20


class Span(NamedTuple):
    """What is read of a file, from start to end: bytes, that lie `line` lines behind its beginning, or row groups or documents
    of a foreign format."""

    start: int
    end: int
    line: int = 0


def is_cut(file: TextFile, split: str) -> bool:
    """Whether a file can be read from its middle on: plain lines of JSON, or text whose documents are paragraphs."""
    return not file.is_compressed and (file.is_json_lines or split == "blank-line")


def cut(file: TextFile, total: int, size: int, split: str) -> Iterator[Span]:
    """Spans of a file of `total` bytes, about `size` bytes each."""
    paragraphs = not file.is_json_lines and split == "blank-line"
    start, line = 0, 0
    for multiple in range(size, total, size):
        if multiple <= start:  # inside a document that is larger than a piece
            continue
        end = _next_start(file.path, multiple, paragraphs)
        if end >= total:
            break
        yield Span(start, end, line)
        line += _lines(file.path, start, end)
        start = end
    yield Span(start, total, line)


def range_at(file: TextFile, total: int, start: int, size: int, split: str) -> Span:
    """The documents that begin in `size` bytes from `start` on, of a file of `total` bytes; lines before it are not counted."""
    paragraphs = not file.is_json_lines and split == "blank-line"
    first = _next_start(file.path, start, paragraphs) if start else 0
    end = _next_start(file.path, start + size, paragraphs) if start + size < total else total
    return Span(first, max(first, end))


def _next_start(path: Path, place: int, paragraphs: bool) -> int:
    """Where the first line, or the first line behind a blank one, begins at or after a place."""
    with open(path, "rb") as file:
        file.seek(place - 1)
        while (line := file.readline(READ)) and not line.endswith(b"\n"):
            pass  # the rest of the line that the place is in
        whole = True  # whether what was read last began a line
        while paragraphs and (line := file.readline(READ)):
            blank, whole = whole and line.endswith(b"\n") and not line.strip(), line.endswith(b"\n")
            if blank:
                break
        return file.tell()


def _lines(path: Path, start: int, end: int) -> int:
    """Line ends between two places."""
    count = 0
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and (block := file.read(min(READ, end - start))):
            count += block.count(b"\n")
            start += len(block)
    return count
