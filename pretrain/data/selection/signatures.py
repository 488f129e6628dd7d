"""What duplicates are found by: of each document of a piece an exact hash, whether a rule drops it, and its MinHash signature.

A file of a piece's documents, in blocks of BLOCK (the last may be short), each column after column:

    exact      16 bytes a document: BLAKE2b of the text
    reasons    1 byte: 0, or the number of the rule that drops it
    values     8 bytes: what that rule measured
    bands      8 bytes for each band, band after band: a band's keys lie together, since each is sorted by itself
    sketches   4 bytes for each permutation, document after document: read where two are compared

then a JSON object (counts, the selection's fingerprint, histograms), its length in 8 bytes, and MAGIC. All little-endian.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.order import Integers, Words
from pretrain.data.selection.config import Near
from pretrain.data.selection.minhash import band_keys
from pretrain.data.selection.rules import Array
from pretrain.errors import UserError

BLOCK = 8192
MAGIC = b"PTSIGN01"


@dataclass(frozen=True)
class Signatures:
    """Of D documents. exact (D, 2) uint64; reasons (D,) uint8; values (D,) float64; sketches (D, P) uint32, P 0 without
    near; histograms (rules, bins): of the documents that each rule measured."""

    exact: Words
    reasons: Array
    values: Array
    sketches: Array
    histograms: Integers

    def __len__(self) -> int:
        return len(self.exact)


class SignatureWriter:
    """Writes a piece's signatures, whole or not at all: a context manager, whose file is there when it was left without an
    exception."""

    def __init__(self, path: Path, fingerprint: str, near: Near | None) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.bands, self.permutations = (near.bands, near.permutations) if near else (0, 0)
        self._draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        self._file = open(self._draft, "wb")  # noqa: SIM115 - closed by __exit__
        self._waiting: list[Signatures] = []
        self._count = self._documents = 0
        self._histograms: Any = 0

    def add(self, found: Signatures) -> None:
        """The next documents'."""
        self._histograms = self._histograms + found.histograms
        self._waiting.append(found)
        self._count += len(found)
        if self._count >= BLOCK:
            self._write(self._count - self._count % BLOCK)

    def _write(self, count: int) -> None:
        """The first `count` of those that wait, as blocks."""
        columns = [np.concatenate(parts) for parts in zip(*map(_columns, self._waiting), strict=True)]
        for first in range(0, count, BLOCK):
            exact, reasons, values, sketches = (column[first : min(first + BLOCK, count)] for column in columns)
            for array in (exact.astype("<u8"), reasons.astype("u1"), values.astype("<f8")):
                self._file.write(array.tobytes())
            if self.bands:
                self._file.write(band_keys(sketches, self.bands).astype("<u8").tobytes())
                self._file.write(sketches.astype("<u4").tobytes())
        self._documents += count
        self._count -= count
        exact, reasons, values, sketches = (column[count:] for column in columns)
        rest = Signatures(exact, reasons, values, sketches, np.zeros(0, np.int64))
        self._waiting = [rest] if self._count else []

    def __enter__(self) -> SignatureWriter:
        return self

    def __exit__(self, failed: Any, *_: object) -> None:
        try:
            if failed is None:
                self._finish()
        finally:
            self._file.close()
            self._draft.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._count:
            self._write(self._count)
        about = {
            "documents": self._documents,
            "bands": self.bands,
            "permutations": self.permutations,
            "fingerprint": self.fingerprint,
            "histograms": np.asarray(self._histograms).tolist() if self._documents else [],
        }
        text = json.dumps(about, sort_keys=True).encode()
        self._file.write(text + len(text).to_bytes(8, "little") + MAGIC)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._draft, self.path)


def _columns(found: Signatures) -> tuple[Array, Array, Array, Array]:
    return found.exact, found.reasons, found.values, found.sketches


class SignatureFile:
    """A piece's file, read where it is needed. Raises UserError where it is damaged or another selection's."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        about = self._about()
        if about["fingerprint"] != fingerprint:
            raise UserError(f"{path}: was made for another selection, or other files of it; remove it to make it anew.")
        self.documents, self.bands, self.permutations = (
            int(about[name]) for name in ("documents", "bands", "permutations")
        )
        self.histograms: list[list[int]] = about["histograms"]
        if self._size + self.documents * self.row != path.stat().st_size:
            raise UserError(f"{path}: damaged, its size is not that of {self.documents:,} documents; remove it.")

    @property
    def row(self) -> int:
        """Bytes of a document."""
        return 16 + 1 + 8 + 8 * self.bands + 4 * self.permutations

    def _about(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                file.seek(-16, os.SEEK_END)
                tail = file.read()
                size = int.from_bytes(tail[:8], "little")
                if tail[8:] != MAGIC or not 0 < size < 1 << 26:
                    raise ValueError("it has no end")
                file.seek(-16 - size, os.SEEK_END)
                found: dict[str, Any] = json.loads(file.read(size))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: damaged signatures ({error}); remove the file to make them anew.") from None
        self._size = size + 16
        return found

    def exact(self) -> Iterator[Words]:
        """(n, 2) of all documents, block by block."""
        return (self._read(first, count, 0, count * 16, "<u8").reshape(count, 2) for first, count in self._blocks())

    def dropped(self) -> Iterator[tuple[Array, Array]]:
        """Reasons and values (n,), block by block."""
        for first, count in self._blocks():
            reasons = self._read(first, count, 16 * count, count, "u1")
            yield reasons, self._read(first, count, 17 * count, 8 * count, "<f8")

    def band(self, number: int) -> Iterator[Words]:
        """Keys (n,) of a band, block by block."""
        return (
            self._read(first, count, (25 + 8 * number) * count, 8 * count, "<u8") for first, count in self._blocks()
        )

    def exact_of(self, places: Sequence[int]) -> Words:
        """(n, 2) of these documents."""
        return self._rows(places, lambda _: 0, 16, "<u8")

    def sketches_of(self, places: Sequence[int]) -> Array:
        """(n, P) of these documents."""
        return self._rows(places, lambda count: (25 + 8 * self.bands) * count, 4 * self.permutations, "<u4")

    def _rows(self, places: Sequence[int], column: Any, size: int, dtype: str) -> Array:
        with open(self.path, "rb", buffering=0) as file:
            parts = []
            for place in places:
                block = place // BLOCK * BLOCK
                count = min(BLOCK, self.documents - block)
                offset = block * self.row + column(count) + (place - block) * size
                parts.append(os.pread(file.fileno(), size, offset))
        return np.frombuffer(b"".join(parts), dtype).reshape(len(places), -1)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """First document and number of each block."""
        return ((first, min(BLOCK, self.documents - first)) for first in range(0, self.documents, BLOCK))

    def _read(self, first: int, count: int, column: int, size: int, dtype: str) -> Array:
        """Of a block: `size` bytes from `column` on."""
        found = np.fromfile(self.path, "u1", size, offset=first * self.row + column)
        return found.view(dtype)
