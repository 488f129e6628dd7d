"""Label sets: learned from the training file in sorted order, or given; an unknown label is told with file and line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.tasks.lines import checked_text, excerpt, fail, kind_of

OUTSIDE = "O"
SHOWN = 20


@dataclass(frozen=True)
class LabelSet:
    """The classes in the order of the model's outputs."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def index(self, label: str, path: str | Path, line: int) -> int:
        """The class's number. Raises UserError, naming label, file and line, for one that training never had."""
        try:
            return self.names.index(label)
        except ValueError:
            shown = ", ".join(self.names[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")
            fail(
                path,
                line,
                f"the label {excerpt(label)} is none of the training file's ({shown}); mend it there or here",
            )


def label_of(path: str | Path, line: int, value: Any) -> str:
    """A cell or JSON value as a label, without white space around it: text or a whole number."""
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        fail(path, line, f"the label must be text or a whole number, not {kind_of(value)}; put it in quotes")
    if not value.strip():
        fail(path, line, "the label is empty; fill it or remove the row")
    return checked_text(path, line, "the label", value).strip()


def number_of(path: str | Path, line: int, value: Any) -> float:
    """A cell or JSON value as the finite number that regression learns."""
    if isinstance(value, str) and not value.strip():
        fail(path, line, "the label is empty; fill it or remove the row")
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = excerpt(value) if isinstance(value, str) else kind_of(value)
        fail(path, line, f"the label must be a finite number for regression, not {shown}; mend it")
    return number


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """Distinct labels in order: as numbers if all are numbers ("10" after "9"), else as text."""
    distinct = sorted(set(labels))
    try:
        values = [float(label) for label in distinct]
    except ValueError:
        return distinct
    return (
        [label for _, label in sorted(zip(values, distinct, strict=True))]
        if all(map(math.isfinite, values))
        else distinct
    )


def learned(path: str | Path, labels: Iterable[str]) -> LabelSet:
    """The label set of a training file. Raises UserError if there are fewer than two classes."""
    names = sorted_labels(labels)
    if len(names) < 2:
        raise UserError(f"{path}:1: every row has the label {names!r}; give a training file with at least two classes.")
    return LabelSet(tuple(names))


def given(path: str | Path, names: Sequence[str], counts: Counter[str]) -> tuple[LabelSet, list[str]]:
    """A given label set, and a warning with counts for each of its classes that the training file lacks."""
    if len(set(names)) != len(names) or len(names) < 2 or not all(name.strip() == name != "" for name in names):
        raise UserError(f"The list of labels {list(names)} must name at least two classes, each once; mend the list.")
    held = ", ".join(f"{name} {counts[name]:,}" for name in names)
    missing = [f"{path}: no row has the label {name!r} ({held})" for name in names if not counts[name]]
    return LabelSet(tuple(names)), missing


def tag_set(tags: Iterable[str]) -> LabelSet:
    """The tags of a tagger: B- and I- of every entity type in the training file, and O; sorted."""
    types = {tag[2:] for tag in tags if tag != OUTSIDE}
    return LabelSet(tuple(sorted({OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI")})))
