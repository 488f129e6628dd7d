"""Multiple choice: a context, a question or both, the choices, and which of them is the answer.

JSON lines: {"context", "question", "choices": [...], "answer"}. Tables: the same columns, but `choice0`, `choice1`, ...
for the choices, of which the last may be empty. The answer is a number from 0, a letter (A is the first), or the
choice itself, word for word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.tasks.lines import checked_text, excerpt, fail, kind_of
from pretrain.tasks.tables import Row, is_json_lines, read_rows

MAX_CHOICES = 100


@dataclass(frozen=True, slots=True)
class Choice:
    """One question. `id`: row number from 0; context and question may be "", not both; answer: number of a choice."""

    id: int
    line: int
    context: str
    question: str
    choices: tuple[str, ...]
    answer: int | None


def read_choices(path: str | Path, labelled: bool = True) -> Iterator[Choice]:
    """Questions of the file. Raises UserError with file and line."""
    for row in read_rows(path):
        context, question = (_optional(path, row, name) for name in ("context", "question"))
        if not (context or question):
            fail(path, row.line, "neither a context nor a question; fill at least one of the two columns")
        choices = _choices(path, row)
        answer = _answer(path, row.line, row.values.get("answer"), choices) if labelled else None
        yield Choice(row.number, row.line, context, question, choices, answer)


def _optional(path: str | Path, row: Row, name: str) -> str:
    value = row.values.get(name)
    return "" if value is None or value == "" else checked_text(path, row.line, f"the {name}", value)


def _choices(path: str | Path, row: Row) -> tuple[str, ...]:
    if is_json_lines(path):
        found = row.values.get("choices")
        if not isinstance(found, list):
            fail(path, row.line, 'there is no list "choices"; give {"question", "choices": [...], "answer"}')
    else:
        found = [value for name, value in row.values.items() if re.fullmatch(r"choice\d+", name)]
        while found and not found[-1].strip():
            found.pop()
    if not 2 <= len(found) <= MAX_CHOICES:
        fail(
            path, row.line, f"{len(found)} choices; give 2 to {MAX_CHOICES} (a table's columns: choice0, choice1, ...)"
        )
    return tuple(checked_text(path, row.line, f"choice {n}", choice) for n, choice in enumerate(found))


def _answer(path: str | Path, line: int, value: Any, choices: tuple[str, ...]) -> int:
    """The number of the right choice, if the value can be read in one way only."""
    if type(value) is int:
        readings = {value}
    elif isinstance(value, str) and value.strip():
        readings = _readings(value.strip(), choices)
    else:
        fail(
            path, line, f"the answer is {'empty' if value == '' else kind_of(value)}; give a number from 0 or a letter"
        )
    inside = sorted(reading for reading in readings if 0 <= reading < len(choices))
    if len(inside) > 1:
        fail(path, line, f"the answer {excerpt(str(value))} may mean choice {inside[0]} or {inside[1]}; give a letter")
    if not inside:
        fail(path, line, f"the answer {excerpt(str(value))} is none of the {len(choices)} choices; numbers begin at 0")
    return inside[0]


def _readings(text: str, choices: tuple[str, ...]) -> set[int]:
    readings = {number for number, choice in enumerate(choices) if choice.strip() == text}
    if re.fullmatch(r"[0-9]{1,3}", text):
        readings.add(int(text))
    elif re.fullmatch(r"[A-Z]", text):
        readings.add(ord(text) - ord("A"))
    return readings
