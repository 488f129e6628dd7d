"""Lines of a labelled file, and how its mistakes are told: every message is `FILE:LINE: what is wrong; what to do`.

All readers of this package go through here, so that a byte-order mark, Windows line ends, another encoding, a binary
file or a line of a gigabyte are met in one place. Lines end at a line feed alone (a carriage return before it is
dropped): U+2028 and its like are text, as tokenizers see them.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from pretrain.errors import UserError

MAX_LINE_BYTES = 16 << 20  # the text of a long book; a longer line is a file without line ends
MAX_FILE_BYTES = 1 << 30  # of a file that is parsed whole (SQuAD's JSON; version 2's training file has 42 MB)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
PLACES = 20


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text without its end; `number` counts from 1."""

    number: int
    text: str


@dataclass
class Findings:
    """What was mended or left out while reading: counts by reason, and the first few places. Strict: the first raises."""

    strict: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, path: str | Path, line: int, reason: str) -> None:
        """Count one finding. Raises UserError with its place when strict."""
        if self.strict:
            fail(path, line, f"{reason}; mend the file, or read it without strict, which counts these")
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES:
            places.append(f"{path}:{line}")

    def sentences(self) -> list[str]:
        """One sentence a reason, for a report."""
        return [
            f"{count:,} x {reason} (first at {self.places[reason][0]})" for reason, count in sorted(self.counts.items())
        ]


def fail(path: str | Path, line: int, what: str) -> NoReturn:
    """Raise UserError in the one form: `FILE:LINE: what is wrong; what to do`."""
    raise UserError(f"{path}:{line}: {what}.")


def read_lines(path: str | Path) -> Iterator[Line]:
    """Lines of a UTF-8 file, one after the other. Raises UserError for what is no text, with line and byte offset."""
    with _opened(path) as stream:
        offset = number = 0
        while raw := _readline(stream, path, number + 1):
            number += 1
            bare = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
            start = offset + len(raw) - len(bare)
            yield Line(number, _decoded(path, number, start, bare.removesuffix(b"\n").removesuffix(b"\r")))
            offset += len(raw)
    if number == 0:
        fail(path, 1, "the file is empty; give a file with at least one example")


def read_text(path: str | Path) -> str:
    """A whole UTF-8 file that is parsed as one value, of at most MAX_FILE_BYTES."""
    with _opened(path) as stream:
        try:
            raw = stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise _unreadable(path, error) from error
    if len(raw) > MAX_FILE_BYTES:
        fail(path, 1, f"larger than the {MAX_FILE_BYTES >> 20} MiB that are parsed at once; use JSON lines (.jsonl)")
    if not raw.strip():
        fail(path, 1, "the file is empty; give a file with at least one example")
    bare = raw.removeprefix(BYTE_ORDER_MARK)
    return _decoded(path, 1, len(raw) - len(bare), bare)


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank. Raises UserError for a line that is no JSON object."""
    number = found = 0
    for line in read_lines(path):
        number = line.number
        if line.text.strip():
            found += 1
            yield number, _object(path, number, line.text)
    if not found:
        fail(path, number, "the file holds blank lines only; give one JSON object a line")


def parse_json(path: str | Path, line: int, text: str) -> Any:
    """The value of a JSON text that begins at `line`. NaN and infinities, which JSON does not know, are refused."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        fail(path, line + error.lineno - 1, f"not JSON: {error.msg} (column {error.colno}); mend the line")
    except RecursionError:
        fail(path, line, "not JSON that can be read: it is nested too deeply; flatten it")
    except ValueError as error:
        fail(path, line, f"not JSON that can be read: {str(error).split(';')[0]}; mend the line")


def checked_text(path: str | Path, line: int, name: str, value: object) -> str:
    """The value if it is a string with something in it that UTF-8 can write, else UserError."""
    if not isinstance(value, str):
        fail(path, line, f"{name} must be text, not {kind_of(value)}; put it in quotes")
    if not value.strip():
        fail(path, line, f"{name} is empty; fill it or remove the example")
    try:
        value.encode()
    except UnicodeEncodeError:
        fail(path, line, f"{name} holds half a surrogate pair, which UTF-8 cannot write; write the whole character")
    return value


def kind_of(value: object) -> str:
    """A JSON value's kind as a reader of JSON calls it."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def excerpt(text: str, length: int = 60) -> str:
    """The text in quotes, cut to what a message can hold."""
    return repr(text if len(text) <= length else text[:length] + "...")


def _object(path: str | Path, number: int, text: str) -> dict[str, Any]:
    value = parse_json(path, number, text)
    if not isinstance(value, dict):
        fail(path, number, f"a JSON object is expected on each line, not {kind_of(value)}; see the formats in the docs")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _opened(path: str | Path) -> IO[bytes]:
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe would wait for ever
            raise UserError(f"{path} is no regular file; give a file of examples.")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}; check the path.") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; check the path.")


def _readline(stream: IO[bytes], path: str | Path, number: int) -> bytes:
    try:
        raw = stream.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(raw) > MAX_LINE_BYTES:
        fail(path, number, f"a line longer than {MAX_LINE_BYTES >> 20} MiB; break the text into several examples")
    return raw


def _decoded(path: str | Path, number: int, offset: int, raw: bytes) -> str:
    """The bytes as text; they begin at line `number` and byte `offset` of the file."""
    if number == 1 and raw.startswith(UTF_16):
        fail(path, 1, "not UTF-8 (byte offset 0: the mark of UTF-16); save the file as UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        found = f"0x{raw[error.start]:02x} at byte offset {offset + error.start}"
        fail(path, line, f"not UTF-8 ({found}); save the file as UTF-8")
    if (zero := raw.find(b"\0")) >= 0:
        line = number + raw.count(b"\n", 0, zero)
        fail(path, line, f"a zero byte (byte offset {offset + zero}): this is no text file; save it as UTF-8 text")
    return text
