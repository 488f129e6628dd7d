"""Rows with named columns from TSV, CSV or JSON lines; the file name's ending tells which.

TSV: cells between tabs, quotes are ordinary characters. CSV: RFC 4180, quoted cells may hold commas, quotes and line
ends. Both begin with a line of column names. JSON lines: one object a line, its keys are the columns. Rows count from
0 in the order of the file; blank lines at the end of a table, and any in JSON lines, are no rows.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.tasks.lines import excerpt, fail, read_json_lines, read_lines

JSON_SUFFIXES = (".jsonl", ".ndjson")
ID = "id"  # a column of this name must not hold a value twice


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `number` from 0, `line` where it begins (from 1), values by column (text but for JSON lines)."""

    number: int
    line: int
    values: dict[str, Any]


Cells = tuple[int, list[str]]  # the line where a record begins, and its cells


def is_json_lines(path: str | Path) -> bool:
    """Whether the name's ending says that each line is a JSON object."""
    return Path(path).suffix.lower() in JSON_SUFFIXES


def read_rows(path: str | Path, names: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of the file. `names`: the columns of a table without a line of names (JSON lines have theirs anyway).

    Raises UserError for a row with other columns than the header's, a repeated id, or a file without rows.
    """
    rows = _json_rows(path) if is_json_lines(path) else _table_rows(path, names)
    seen: dict[str, int] = {}
    for row in rows:
        if isinstance(name := row.values.get(ID), str | int):
            check_unique(path, row.line, str(name), seen)
        yield row


def check_unique(path: str | Path, line: int, name: str, seen: dict[str, int]) -> None:
    """Note the id's line in `seen`. Raises UserError if it is there already."""
    if name in seen:
        fail(path, line, f"the id {excerpt(name)} is already that of line {seen[name]}; ids must differ")
    seen[name] = line


def split_cells(path: str | Path) -> Iterator[Cells]:
    """Records of a TSV or CSV file as lists of cells, blank lines at the end left out."""
    readers: dict[str, Callable[[str | Path], Iterator[Cells]]] = {".tsv": _tab_cells, ".csv": _comma_cells}
    if (reader := readers.get(Path(path).suffix.lower())) is None:
        fail(path, 1, "the name's ending must tell the format; name it .tsv, .csv or .jsonl (one JSON object a line)")
    blanks: list[Cells] = []
    for line, cells in reader(path):
        if any(cell.strip() for cell in cells):
            yield from blanks
            blanks.clear()
            yield line, cells
        elif len(blanks) < 2:  # the first tells where the file goes wrong; more would only fill memory
            blanks.append((line, cells))


def check_width(path: str | Path, line: int, cells: list[str], names: Sequence[str]) -> None:
    """Raise UserError unless the record has a cell for each column."""
    if len(cells) != len(names):
        many = "many" if len(cells) > len(names) else "few"
        few_columns = f"{len(cells)} where there must be {len(names)}: {', '.join(names)}"
        fail(path, line, f"too {many} columns, {few_columns}; mend the row or quote the text")


def _json_rows(path: str | Path) -> Iterator[Row]:
    for number, (line, values) in enumerate(read_json_lines(path)):
        yield Row(number, line, values)


def _table_rows(path: str | Path, names: Sequence[str] | None) -> Iterator[Row]:
    number, line = -1, 1
    for line, cells in split_cells(path):
        if names is None:
            names = _header(path, line, cells)
            continue
        check_width(path, line, cells, names)
        number += 1
        yield Row(number, line, dict(zip(names, cells, strict=True)))
    if number < 0:
        fail(path, line, "no rows: the file is empty or holds the header only; give at least one example")


def _header(path: str | Path, line: int, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not all(names) or len(set(names)) != len(names):
        fail(path, line, "the first line must name the columns, each once, as in label<TAB>text; add such a header")
    return names


def _tab_cells(path: str | Path) -> Iterator[Cells]:
    for line in read_lines(path):
        yield line.number, line.text.split("\t")


def _comma_cells(path: str | Path) -> Iterator[Cells]:
    reader = csv.reader((f"{line.text}\n" for line in read_lines(path)), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "a quote that opens is not closed, or one inside is not doubled"
            fail(path, line, f"not CSV: {error}; mend the quotes ({hint}), or use .tsv or .jsonl")
        yield line, cells
