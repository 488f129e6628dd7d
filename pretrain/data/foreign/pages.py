"""How large the pages of a Parquet column declare to be, before anything is unpacked.

A page of a few kilobytes may declare two gigabytes, and pyarrow allocates what is declared. So each page's header is read
first: a struct of Thrift's compact protocol, of which two numbers matter.

    page = header (type, uncompressed size, compressed size, ...), compressed bytes; pages lie one after the other
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

MAX_HEADER = 1 << 20  # bytes; statistics of long texts lie in it
FIRST_READ = 1 << 12
MAX_DEPTH = 16
KINDS = (0, 2, 3)  # of pages: data, a dictionary, data in the newer form; pyarrow passes over others without a word
BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12  # types on the wire


class BadPage(Exception):
    """The bytes are no pages."""


class Page(NamedTuple):
    """Bytes: of the header, and of what follows it, unpacked and packed."""

    header: int
    unpacked: int
    packed: int


def largest_page(read: Callable[[int, int], bytes], start: int, size: int) -> int:
    """The most bytes that a page of a column chunk declares. read: (offset, count) -> bytes of the file. start, size: of the
    chunk, in bytes. Raises BadPage."""
    place, end, largest = start, start + size, 0
    while place < end:
        page = _page(read, place, end)
        largest = max(largest, page.unpacked)
        place += page.header + page.packed
    if place != end:
        raise BadPage("its pages are longer than their column")
    return largest


def _page(read: Callable[[int, int], bytes], place: int, end: int) -> Page:
    for count in (FIRST_READ, MAX_HEADER):
        data = read(place, min(count, end - place))
        try:
            return _Header(data).page()
        except IndexError:
            if len(data) < count:
                break
    raise BadPage("a page's header is cut short")


class _Header:
    """A reader of a compact struct. Raises IndexError behind the end of the bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def page(self) -> Page:
        numbers: dict[int, int] = {}
        field = 0
        while (kind := self._byte()) != 0:
            field = field + (kind >> 4) if kind >> 4 else self._zigzag()
            if kind & 15 in INTEGERS:
                numbers[field] = self._zigzag()
            else:
                self._skip(kind & 15, MAX_DEPTH)
        page = Page(self.place, numbers.get(2, -1), numbers.get(3, -1))
        if min(page) < 0 or numbers.get(1) not in KINDS:
            raise BadPage("a page's header does not tell its size, or its kind is unknown")
        return page

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise BadPage("a number in a page's header has no end")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, kind: int, depth: int) -> None:
        if depth == 0:
            raise BadPage("a page's header is nested too deep")
        if kind in INTEGERS:
            self._varint()
        elif kind in (BYTE, DOUBLE):
            self.place += 1 if kind == BYTE else 8
        elif kind == BINARY:
            length = self._varint()
            self.place += length
        elif kind in LISTS:
            self._skip_list(depth)
        elif kind == STRUCT:
            while (inner := self._byte()) != 0:
                if not inner >> 4:
                    self._zigzag()
                self._skip(inner & 15, depth - 1)
        elif kind not in BOOLEANS:
            raise BadPage("a page's header has a field of an unknown kind")

    def _skip_list(self, depth: int) -> None:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        for _ in range(count):
            if self.place > len(self.data):
                raise IndexError
            if head & 15 in BOOLEANS:  # in a list they take a byte
                self.place += 1
            else:
                self._skip(head & 15, depth - 1)
