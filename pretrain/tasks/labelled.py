"""Classification and regression: a label, or a number, for one text or a pair of texts.

Columns: `label`, and one or two more that are the texts in their order (an `id` column is left out), or the columns
that are named. Without labels (prediction) the label's column may be missing and is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.tasks.labels import label_of, number_of
from pretrain.tasks.lines import checked_text, fail
from pretrain.tasks.tables import ID, Row, read_rows

LABEL = "label"


@dataclass(frozen=True, slots=True)
class Classified:
    """A row of classification. `id`: row number from 0; label None where none was asked for."""

    id: int
    line: int
    texts: tuple[str, ...]
    label: str | None


@dataclass(frozen=True, slots=True)
class Rated:
    """A row of regression. `id`: row number from 0; value None where none was asked for."""

    id: int
    line: int
    texts: tuple[str, ...]
    value: float | None


def read_classified(
    path: str | Path, texts: Sequence[str] | None = None, label: str = LABEL, labelled: bool = True
) -> Iterator[Classified]:
    """Examples of classification. `texts`, `label`: columns. Raises UserError with file and line."""
    for row, pair in _rows(path, texts, label, labelled):
        value = label_of(path, row.line, row.values[label]) if labelled else None
        yield Classified(row.number, row.line, pair, value)


def read_rated(
    path: str | Path, texts: Sequence[str] | None = None, label: str = LABEL, labelled: bool = True
) -> Iterator[Rated]:
    """Examples of regression. `texts`, `label`: columns. Raises UserError with file and line."""
    for row, pair in _rows(path, texts, label, labelled):
        value = number_of(path, row.line, row.values[label]) if labelled else None
        yield Rated(row.number, row.line, pair, value)


def _rows(
    path: str | Path, texts: Sequence[str] | None, label: str, labelled: bool
) -> Iterator[tuple[Row, tuple[str, ...]]]:
    for row in read_rows(path):
        texts = _text_columns(path, row, label) if texts is None else texts
        for name in [*texts, *([label] if labelled else [])]:
            if name not in row.values:
                _fail_column(path, row, name)
        yield row, tuple(checked_text(path, row.line, f"the column {name!r}", row.values[name]) for name in texts)


def _text_columns(path: str | Path, row: Row, label: str) -> list[str]:
    """The one or two columns that are neither label nor id."""
    names = [name for name in row.values if name not in (label, ID)]
    if not 1 <= len(names) <= 2:
        fail(path, 1, f"columns {', '.join(row.values)}: which are the texts is not clear; name one or two of them")
    return names


def _fail_column(path: str | Path, row: Row, name: str) -> None:
    found = ", ".join(repr(column)[:40] for column in list(row.values)[:8])
    header = "the first line must name the columns, for example label<TAB>text"
    line = row.line if Path(path).suffix.lower() not in (".tsv", ".csv") else 1
    fail(path, line, f"there is no column {name!r} among {found}; {header}")
