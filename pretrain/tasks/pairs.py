"""Sequence to sequence: a source and its target, from a table of two columns or two files aligned by lines.

TSV and CSV have no line of names unless `columns` names two of them (then they have); JSON lines have the keys
"source" and "target".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from pretrain.tasks.lines import checked_text, fail, read_lines
from pretrain.tasks.tables import Row, is_json_lines, read_rows, split_cells

SOURCE, TARGET = "source", "target"
HEADERS = {
    ("source", "target"),
    ("src", "tgt"),
    ("src", "trg"),
    ("src", "target"),
    ("input", "output"),
    ("text", "label"),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """`id`: row number from 0; target None where none was asked for."""

    id: int
    line: int
    source: str
    target: str | None


def read_pairs(path: str | Path, columns: tuple[str, str] | None = None, labelled: bool = True) -> Iterator[Pair]:
    """Pairs of a TSV, CSV or JSON lines file. Raises UserError with file and line."""
    source, target = columns or (SOURCE, TARGET)
    has_names = columns is not None or is_json_lines(path)
    for row in read_rows(path, None if has_names else _unnamed(path, labelled)):
        if row.number == 0 and not has_names:
            _check_no_header(path, row)
        for name in (source, target)[: 1 + labelled]:
            if name not in row.values:
                fail(path, row.line, f"there is no column {name!r}; give both sides of the pair, or name the columns")
        sides = [_side(path, row.line, name, row.values[name]) for name in (source, target)[: 1 + labelled]]
        yield Pair(row.number, row.line, sides[0], sides[1] if labelled else None)


def read_aligned(source: str | Path, target: str | Path) -> Iterator[Pair]:
    """Pairs of two files, line by line. Raises UserError where a side is missing or one file has more lines."""
    lines = zip_longest(read_lines(source), read_lines(target))
    for number, (left, right) in enumerate(lines):
        if left is None or right is None:
            more, less = (source, target) if right is None else (target, source)
            total = number + 1 + sum(1 for _ in lines)
            fail(more, number + 1, f"{total:,} lines, but {less} has {number:,}; line n of one must belong to line n")
        text, other = _side(source, number + 1, SOURCE, left.text), _side(target, number + 1, TARGET, right.text)
        yield Pair(number, number + 1, text, other)


def read_sources(path: str | Path) -> Iterator[Pair]:
    """Sources alone, for prediction: one a line of any text file."""
    for line in read_lines(path):
        yield Pair(line.number - 1, line.number, _side(path, line.number, SOURCE, line.text), None)


def _unnamed(path: str | Path, labelled: bool) -> list[str]:
    """Columns of a table without names: both, or for prediction the source with or without a target."""
    if labelled:
        return [SOURCE, TARGET]
    _, cells = next(split_cells(path), (1, [""]))
    return [SOURCE, TARGET][: max(1, min(2, len(cells)))]


def _check_no_header(path: str | Path, row: Row) -> None:
    if tuple(str(value).strip().lower() for value in row.values.values()) in HEADERS:
        fail(path, row.line, "a header where none is expected; remove this line, or name its columns")


def _side(path: str | Path, line: int, name: str, value: object) -> str:
    if isinstance(value, str) and not value.strip():
        fail(path, line, f"the pair has no {name} (an empty side); fill it or remove the pair")
    return checked_text(path, line, f"the {name}", value)
