"""Megatron-LM's indexed data sets: NAME.idx says where the documents of NAME.bin lie.

    .idx  "MMIDIDX\\0\\0", version 1 (uint64), code of the ids' type (uint8), S sequences (uint64), D + 1 (uint64),
          lengths of the sequences in ids (S int32), their places in bytes (S int64), the first sequence of each document and,
          last, S (D + 1 int64); of multimodal sets a mode of each sequence (S int8), which is refused
    .bin  ids, one sequence behind the other

Sequences of a document (its sentences, where they were split) are joined. Which id ends a document is not in the files: it is
the user's --eos-id; else the tokenizer's own or one other that all documents end with. Documents are numbered from 1.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.documents import Document, Reading, Skipped, TextFile
from pretrain.data.foreign.tokens import MAX_TOKENS, token_documents
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS = (6, 7)
WINDOW = 1 << 16  # entries of the index that are looked at together
LOOKED_AT = 1024  # documents whose last ids say which id ends one
PIECE_BYTES = 64 << 20  # of ids that are read together
NO_END = -1  # as --eos-id: no id ends a document

Integers = np.ndarray[Any, np.dtype[np.int64]]


def read_megatron(file: TextFile, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    """Documents of the pair of files, or those of its span, with their ids. Raises UserError where the index is none, does not
    fit the ids, or the tokenizer does not have them."""
    if reading.tokenizer is None:
        raise UserError(f"{file.name} holds tokens: name by --tokenizer the tokenizer that they were made with.")
    data = Indexed(file)
    try:
        end = data.end_of_document(reading.tokenizer, reading.eos_id)
        for number, ids in data.documents(*(file.span or (0, data.num_documents))):
            name = f"{file.name}:{number + 1}"
            if len(ids) > MAX_TOKENS:
                skipped.add(name, f"a document of more than {MAX_TOKENS:,} tokens")
            elif not len(ids):
                skipped.add(name, "empty")
            else:
                if reading.eos_id is None and end is not None:
                    _check_end(name, ids, end)
                yield from token_documents(name, ids, reading.tokenizer, skipped, end)
    finally:
        data.close()


def cut_megatron(file: TextFile) -> list[tuple[int, int]]:
    """Spans of documents (first, behind the last) of about PIECE_BYTES each. Raises UserError as reading does."""
    data = Indexed(file)
    try:
        return list(data.spans())
    finally:
        data.close()


class Indexed:
    """The two files, open. Nothing is read of them but what is asked for, and nothing of it is trusted."""

    def __init__(self, file: TextFile) -> None:
        self.name = file.name
        self._index = self._open(file.path)
        try:
            self._ids = self._open(file.path.with_suffix(".bin"))
        except UserError:
            os.close(self._index)
            raise
        try:
            self._read_header()
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._index)
        os.close(self._ids)

    def documents(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """(number, its ids (P,)) of the documents first to last - 1. Ids of one that is longer than MAX_TOKENS are the first of
        it. Raises UserError where the index is not one of these ids."""
        for begin in range(first, last, WINDOW):
            bounds = self._bounds(begin, min(begin + WINDOW, last))
            for number, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True), begin):
                yield number, self._ids_of(start, stop)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Documents that are read together."""
        start = begun = 0
        for begin in range(0, self.num_documents, WINDOW):
            end = min(begin + WINDOW, self.num_documents)
            for number, stop in enumerate(self._bounds(begin, end)[1:].tolist(), begin + 1):
                if stop - begun >= PIECE_BYTES or number == self.num_documents:
                    yield start, number
                    start, begun = number, stop

    def end_of_document(self, tokenizer: Tokenizer, wished: int | None) -> int | None:
        """The id that ends the documents. Raises UserError where it has to be named."""
        if wished is not None:
            return None if wished == NO_END else wished
        step = -(-self.num_documents // LOOKED_AT)
        last = set()
        for number in range(0, self.num_documents, max(step, 1)):
            start, stop = self._bounds(number, number + 1).tolist()
            if stop > start:
                last |= set(self._ids_of(max(start, stop - self.dtype.itemsize), stop).tolist())
        if last <= {tokenizer.eos}:
            return tokenizer.eos
        if len(last) == 1 and self.num_documents > 1:
            return int(last.pop())
        raise UserError(
            f"{self.name}: its documents do not all end in one id: name by --eos-id the id that ends a document, or "
            f"--eos-id {NO_END} if none does."
        )

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place must not block
        except OSError as error:
            raise UserError(
                f"Cannot read {path}: {error.strerror}. Documents of {self.name} need both the .idx and the .bin file."
            ) from error

    def _read_header(self) -> None:
        size, self._bytes = os.fstat(self._index).st_size, os.fstat(self._ids).st_size
        raw = self._pread(self._index, 0, min(HEADER.size, size))
        if not raw.startswith(MAGIC) or len(raw) < HEADER.size:
            raise UserError(f"{self.name} is not an index of Megatron-LM's (MMIDIDX), or it was cut short.")
        _, version, code, self._sequences, bounds = HEADER.unpack(raw)
        if version != VERSION:
            raise UserError(f"{self.name} has version {version}; this program reads version {VERSION}.")
        if code not in DTYPES:
            what = "numbers with a fraction, not ids" if code in FLOATS else f"ids of an unknown type ({code})"
            raise UserError(f"{self.name} holds {what}: make it again from the text.")
        self.dtype, self.num_documents = np.dtype(DTYPES[code]), bounds - 1
        rest = size - HEADER.size - 12 * self._sequences - 8 * bounds
        if rest == self._sequences > 0:
            raise UserError(f"{self.name} is of a multimodal data set (a mode of each sequence); only text is read.")
        if rest or bounds < 2 or self._bytes % self.dtype.itemsize:
            self._refuse("its size is not that of what it declares")
        self._places = HEADER.size + 4 * self._sequences
        self._firsts = self._places + 8 * self._sequences

    def _bounds(self, first: int, last: int) -> Integers:
        """(last - first + 1,) int64: where the documents first to last - 1 begin in the .bin file, and where the last ends.
        Checked: they lie one behind the other, from the file's first byte to its last."""
        sequences = self._entries(self._firsts, first, last + 1, "<i8")
        begin, end = int(sequences[0]), int(sequences[-1])
        if np.any(sequences[1:] < sequences[:-1]) or not 0 <= begin <= end <= self._sequences:
            self._refuse("its documents are not in order")
        if (first == 0 and begin) or (last == self.num_documents and end != self._sequences):
            self._refuse("it has sequences that belong to no document")
        places = np.append(self._places_of(begin, min(end + 1, self._sequences)), self._bytes)
        return places[sequences - begin]

    def _places_of(self, first: int, last: int) -> Integers:
        """(last - first,) int64: where sequences begin, in bytes."""
        parts = [np.empty(0, np.int64)]
        for begin in range(first, last, WINDOW):
            end = min(begin + WINDOW, last)
            places = self._entries(self._places, begin, min(end + 1, self._sequences), "<i8")
            lengths = self._entries(self._places - 4 * self._sequences, begin, end, "<i4").astype(np.int64)
            following = np.append(places, self._bytes)[1 : end - begin + 1]
            if np.any(lengths < 0) or np.any(places[: end - begin] + lengths * self.dtype.itemsize != following):
                self._refuse("its sequences do not lie one behind the other")
            parts.append(places[: end - begin])
        places = np.concatenate(parts)
        if np.any(places < 0) or np.any(places > self._bytes) or (first == 0 and len(places) and places[0]):
            self._refuse("its sequences lie outside the .bin file")
        return places

    def _entries(self, start: int, first: int, last: int, dtype: str) -> np.ndarray[Any, Any]:
        size = np.dtype(dtype).itemsize
        return np.frombuffer(self._pread(self._index, start + first * size, (last - first) * size), dtype)

    def _ids_of(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        size = min(stop - start, (MAX_TOKENS + 1) * self.dtype.itemsize)
        return np.frombuffer(self._pread(self._ids, start, size), self.dtype)

    def _pread(self, file: int, start: int, size: int) -> bytes:
        data = b""
        try:
            while len(data) < size and (more := os.pread(file, size - len(data), start + len(data))):
                data += more
        except OSError as error:
            raise UserError(f"Cannot read {self.name}: {error.strerror}.") from error
        if len(data) < size:
            self._refuse("a file was cut short while it was read")
        return data

    def _refuse(self, why: str) -> None:
        raise UserError(
            f"{self.name} is damaged, or not the index of the .bin file beside it: {why}. Copy both again from where they "
            "were made."
        )


def _check_end(name: str, ids: np.ndarray[Any, Any], end: int) -> None:
    """That an id which nobody named is an end: of this document too, and nowhere inside."""
    if int(ids[-1]) != end or np.any(ids[:-1] == end):
        raise UserError(
            f"{name}: most documents end in the id {end}, but this one does not, or has it inside too: name by --eos-id the id "
            f"that ends a document, or --eos-id {NO_END} if none does."
        )
