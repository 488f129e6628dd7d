"""Parquet tables: a document a row, the text of one column, row group by row group.

The column is named as in the file, of a column inside a struct with dots ("meta.body"). Rows are numbered from 1 through the
file, however it is cut. Memory is bounded by pages, not row groups: `pages.py` looks at what they declare, and so few rows are
decoded at once that even a dictionary's longest text in each of them stays below MAX_BATCH_BYTES.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from pretrain.data.documents import Document, Reading, Skipped, TextFile, text_document
from pretrain.data.foreign.pages import BadPage, largest_page
from pretrain.errors import UserError

MAGIC = b"PAR1"
MAX_FOOTER = 64 << 20
MAX_GROUP_BYTES = 16 << 30  # of the text column in a row group, unpacked
MAX_PAGE_BYTES = 128 << 20
MAX_BATCH_BYTES, MAX_BATCH_ROWS = 64 << 20, 1024
BOMB_BYTES, BOMB_RATIO, ROW_BYTES = 256 << 20, 1000, 256  # a row counts for ROW_BYTES and its text
PIECE_BYTES = 256 << 20  # of text in row groups that are read together


class Damaged(Exception):
    """The file is not what it should be. The message is the reason, for a report."""


def read_parquet(file: TextFile, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    """Documents of the file's row groups, or of those of its span. Raises UserError where there is no such column."""
    table = None
    try:
        table = Table(file, reading.text_field)
        for group in range(*(file.span or (0, table.metadata.num_row_groups))):
            yield from table.documents(group, skipped)
    except Damaged as error:
        skipped.add(file.name, str(error))
    finally:
        if table is not None:
            table.close()


def cut_parquet(file: TextFile) -> list[tuple[int, int]]:
    """Spans of row groups (first, behind the last) of about PIECE_BYTES each; none of a file that cannot be read."""
    try:
        table = Table(file, None)
    except (Damaged, OSError):
        return []
    try:
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.metadata.num_row_groups)]
    finally:
        table.close()
    spans, start, size = [], 0, 0
    for group, bytes_of_group in enumerate(sizes):
        size += bytes_of_group
        if size >= PIECE_BYTES or group == len(sizes) - 1:
            spans.append((start, group + 1))
            start, size = group + 1, 0
    return spans


class Table:
    """An open file. field: its text column; None: only its footer is asked for. Raises Damaged, OSError, UserError."""

    def __init__(self, file: TextFile, field: str | None) -> None:
        pyarrow, parquet = _library()
        self.name, self._errors = file.name, (pyarrow.ArrowException, OSError, MemoryError)
        self._handle = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._size = os.fstat(self._handle).st_size
            self._check_footer()
            self._file = self._opened(pyarrow, parquet, file)
            self.metadata = self._file.metadata
            self._weight = 0
            if field is not None:
                self._column = self._column_of(field)
                self._path: list[str] = self._file.schema.column(self._column).path.split(".")
                self._field = field
        except BaseException:
            os.close(self._handle)
            raise

    def close(self) -> None:
        self._file.close(force=True)
        os.close(self._handle)

    def documents(self, group: int, skipped: Skipped) -> Iterator[Document]:
        """Of a row group. Raises Damaged."""
        row = sum(self.metadata.row_group(before).num_rows for before in range(group))
        last = row + self.metadata.row_group(group).num_rows
        rows = self._rows_at_once(group)
        try:
            batches = self._file.iter_batches(rows, [group], [self._dotted], use_threads=False)
            for batch in batches:
                for value in self._values(batch):
                    row += 1
                    yield from self._document(f"{self.name}:{row}", value, skipped)
        except self._errors as error:
            raise Damaged("a damaged Parquet file") from error
        if row != last:
            raise Damaged("a Parquet file with other rows than it declares")

    @property
    def _dotted(self) -> str:
        return ".".join(self._path)

    def _document(self, where: str, value: Any, skipped: Skipped) -> Iterator[Document]:
        self._weight += ROW_BYTES + (len(value) if value is not None else 0)
        if self._weight > BOMB_BYTES and self._weight > BOMB_RATIO * self._size:
            raise Damaged(f"a Parquet file that unpacks to more than {BOMB_RATIO:,} times its size")
        if isinstance(value, bytes):
            yield from text_document(where, value, skipped)
        elif value is None:
            skipped.add(where, f"without a text field {self._field!r}")
        elif not value.strip():
            skipped.add(where, "empty")
        else:
            yield Document(where, value)

    def _values(self, batch: Any) -> list[Any]:
        """The text column's values: str, or bytes where they are no UTF-8 or the column's type is binary."""
        import pyarrow as pa
        from pyarrow import compute

        column = batch.column(0)
        if len(self._path) > 1:
            column = compute.struct_field(column, self._path[1:])
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:
            return list(column.cast(pa.large_binary()).to_pylist())

    def _rows_at_once(self, group: int) -> int:
        """How many rows can be decoded together whatever their pages hold. Raises Damaged for too large ones."""
        chunk = self.metadata.row_group(group).column(self._column)
        if chunk.total_uncompressed_size > MAX_GROUP_BYTES:
            raise Damaged(f"a Parquet file with a row group of more than {MAX_GROUP_BYTES >> 30} GiB of text")
        offsets = [offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset]
        start, size = min(offsets, default=0), chunk.total_compressed_size
        if not 0 < start <= start + size <= self._size:
            raise Damaged("a Parquet file whose pages lie outside it")
        try:
            largest = largest_page(lambda offset, count: os.pread(self._handle, count, offset), start, size)
        except BadPage as error:
            raise Damaged("a damaged Parquet file") from error
        if largest > MAX_PAGE_BYTES:
            raise Damaged(f"a Parquet file with a page of more than {MAX_PAGE_BYTES >> 20} MiB")
        return max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES // max(largest, 1)))

    def _check_footer(self) -> None:
        end = os.pread(self._handle, 8, max(0, self._size - 8))
        if self._size < 12 or os.pread(self._handle, 4, 0) != MAGIC or end[4:] != MAGIC:
            raise Damaged("not a Parquet file, or one cut short")
        if not 0 < int.from_bytes(end[:4], "little") <= min(MAX_FOOTER, self._size - 12):
            raise Damaged("a Parquet file whose footer cannot be that long")

    def _opened(self, pyarrow: Any, parquet: Any, file: TextFile) -> Any:
        source = pyarrow.OSFile(os.fspath(file.path))  # a path would be looked at as a URL first
        try:
            return parquet.ParquetFile(
                source,
                buffer_size=1 << 20,
                pre_buffer=False,
                page_checksum_verification=True,  # where the file has them
                arrow_extensions_enabled=False,
            )
        except self._errors as error:
            source.close()
            raise Damaged("a damaged Parquet file") from error

    def _column_of(self, field: str) -> int:
        """The number of the text column among the file's leaves. Raises UserError."""
        schema = self._file.schema
        columns = {schema.column(number).path: number for number in range(len(schema))}
        number = columns.get(field)
        if number is None:
            raise UserError(
                f"{self.name} has no column {field!r}; it has {', '.join(map(repr, list(columns)[:20]))}: name one by "
                "--text-field."
            )
        column = schema.column(number)
        if column.max_repetition_level or column.physical_type != "BYTE_ARRAY" or column.logical_type.type not in TEXTS:
            raise UserError(f"{self.name}: its column {field!r} is not of texts: name another by --text-field.")
        return number


TEXTS = ("STRING", "NONE")  # Parquet's logical types of strings and of bare bytes


def _library() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow; install it: pip install 'pretrain-engine[data]'") from None
    return pyarrow, parquet
