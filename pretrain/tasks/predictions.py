"""Prediction files: one JSON object a line, in the order of the input, written so that a killed run goes on.

FILE.partial     lines so far; the last may be cut: it is dropped and written again
FILE.partial.of  what the predictions depend on (model, input, settings: the caller's text); another begins anew
FILE             the whole, renamed into place at the end: it exists complete or not at all
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from pretrain.errors import UserError
from pretrain.tasks.lines import fail, kind_of, read_json_lines

Item = TypeVar("Item")
KINDS = ("label", "tags", "answer", "text")  # the key that a task's predictions are under


class PredictionWriter:
    """Append predictions in order; a context manager that finishes the file unless an exception leaves it."""

    def __init__(self, path: str | Path, depends_on: str) -> None:
        self._path = Path(path)
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._of = self._path.with_name(self._path.name + ".partial.of")
        self.num_done = 0
        self._last_id: int | str | None = None
        try:
            if self._of.is_file() and self._partial.is_file() and self._of.read_text("utf-8") == depends_on:
                self._keep_whole_lines()
            else:
                self._partial.write_bytes(b"")
                _write_whole(self._of, depends_on.encode())
            self._file: IO[bytes] = open(self._partial, "ab")  # noqa: SIM115 - closed by finish or __exit__
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; check the folder.") from error

    def remaining(self, items: Iterator[Item], id_of: Callable[[Item], int | str]) -> Iterator[Item]:
        """The input's items that have no prediction yet. Raises UserError if the input is not the one begun with."""
        done = self.num_done
        for number, item in enumerate(items):
            if number == done - 1 and id_of(item) != self._last_id:
                raise UserError(f"{self._partial} was begun with another input; remove it to begin anew.")
            if number >= done:
                yield item

    def write(self, prediction: dict[str, Any]) -> None:
        """Append one object. Raises UserError for scores that are not finite: no reader could take them."""
        try:
            line = json.dumps(prediction, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise UserError(
                f"{self._path}: the prediction of {prediction.get('id')} has scores that are not finite; "
                "the model's weights are broken: use an earlier checkpoint."
            ) from error
        self._file.write(line.encode() + b"\n")
        self.num_done += 1

    def flush(self) -> None:
        """Hand what was written to the system, so that a killed process loses none of it."""
        self._file.flush()

    def finish(self) -> None:
        """Make the file whole under its own name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)
        self._of.unlink(missing_ok=True)

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._file.close()

    def _keep_whole_lines(self) -> None:
        """Count the lines that are whole objects, and cut the file after the last of them."""
        size = 0
        with open(self._partial, "rb") as stream:
            for raw in stream:
                if (value := _whole(raw)) is None:
                    break
                size += len(raw)
                self.num_done += 1
                self._last_id = value["id"]
        os.truncate(self._partial, size)


def read_predictions(path: str | Path, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each prediction of a kind (one of KINDS). Raises UserError with file and line."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {KINDS}")
    for line, value in read_json_lines(path):
        if type(value.get("id")) not in (int, str):
            fail(path, line, 'each prediction needs an "id", the row number from 0 or the question\'s; add it')
        if kind not in value or not _fits(kind, value[kind]):
            found = kind_of(value[kind]) if kind in value else "nothing"
            fail(path, line, f'the prediction of {value["id"]!r} has {found} as "{kind}"; give the task\'s own kind')
        yield line, value


def _fits(kind: str, value: Any) -> bool:
    if kind == "label":
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind == "tags":
        return isinstance(value, list) and all(isinstance(tag, str) for tag in value)
    return isinstance(value, str)


def _whole(raw: bytes) -> dict[str, Any] | None:
    """The object of a line, None if the line was cut."""
    try:
        value = json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and type(value.get("id")) in (int, str) else None


def _write_whole(path: Path, data: bytes) -> None:
    """The file with the data, or as it was."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def by_label(names: Sequence[str], probabilities: Sequence[float]) -> dict[str, float]:
    """The "scores" of a label's prediction: every class by its own name, so that no order can be mistaken."""
    return dict(zip(names, map(float, probabilities), strict=True))
