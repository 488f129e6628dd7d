"""What is to be read, cut into pieces that are done one by one: by any process, in any order, on any machine.

    WORK/pieces.jsonl     a line a piece: its spans, each a file or a range of one
    WORK/pieces.starts    where each of these lines begins, int64
    WORK/plan.json        counts, the options that decide the bytes, and what reads the files; written last

Pieces depend on the files and their sizes alone. Small files come together in one piece; a large file of lines or of
paragraphs is cut where one begins, and where so many lines have gone before that documents are named as in the whole file.
Only the list of files is ever in memory, never their text.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.documents import TextFile, pieces_of
from pretrain.data.foreign import kinds
from pretrain.data.preparing import cutting
from pretrain.data.preparing.cutting import Span
from pretrain.data.preparing.files import read_json, write_whole
from pretrain.data.preparing.options import Options
from pretrain.errors import UserError

VERSION = 1
PLAN, PIECES, STARTS = "plan.json", "pieces.jsonl", "pieces.starts"
LEAST_BYTES, MOST_BYTES = 4 << 20, 64 << 20  # of a piece's text
PIECES_AT_LEAST = 16  # of a corpus that has so many of the least size, for as many processes
MOST_FILES = 4096  # of a piece
GONE = (-1, 0)
MEND = "Bring back what was there when the work began, or throw the work away with --restart."


class Changed(UserError):
    """Files or options are not those of the plan."""


class Input(NamedTuple):
    """A file as the plan knows it. size, time: bytes and nanoseconds of its last change; GONE if it was no plain file. part: of
    the split, where the data set says it."""

    name: str
    path: str
    size: int
    time: int
    part: str | None

    @classmethod
    def of(cls, file: TextFile) -> Input:
        return cls(file.name, os.path.abspath(file.path), *state(file.path), file.part)

    def file(self, span: Span | None = None) -> TextFile:
        """To read, whole or in part."""
        path = Path(self.path)
        if span is None:
            return TextFile(path, self.name, part=self.part)
        return TextFile(path, self.name, (span.start, span.end), self.part, span.line)


class Piece(NamedTuple):
    """What one process reads at a time."""

    number: int
    spans: tuple[tuple[Input, Span | None], ...]

    @property
    def files(self) -> list[TextFile]:
        """To read, in order."""
        return [one.file(span) for one, span in self.spans]

    @property
    def name(self) -> str:
        """For messages."""
        (first, span), more = self.spans[0], len(self.spans) - 1
        unit = "bytes" if kinds.kind_of(Path(first.path)) is None else "parts"
        place = "" if span is None else f", {unit} {span.start:,} to {span.end:,}"
        return f"piece {self.number} ({first.name}{place}{f' and {more:,} more' if more else ''})"

    @property
    def bytes(self) -> int | None:
        """Of its text; None where compression or JSON around it hides how many."""
        if any(file.is_compressed or file.is_json_lines for file in self.files):
            return None
        return sum(max(one.size, 0) if span is None else span.end - span.start for one, span in self.spans)

    def check(self) -> None:
        """Raises Changed if a file is no longer what the plan was made of."""
        for planned, _ in self.spans:
            if problem := difference(planned):
                raise Changed(f"{problem} {MEND}")


@dataclass(frozen=True)
class Plan:
    """A work folder's plan. `options`: those that decide what is written; `bytes`: of the files, as they lie there."""

    work: Path
    pieces: int
    files: int
    bytes: int
    options: dict[str, Any]
    selection: str | None  # path of its file
    compares: bool  # whether documents are compared with each other before they are selected

    @classmethod
    def open(cls, work: Path) -> Plan | None:
        """That of the folder; None where none was finished."""
        value = read_json(work / PLAN)
        if value is None:
            return None
        if value.get("version") != VERSION:
            raise UserError(
                f"{work}: was begun by another version of this program. Go on with that one, or give --restart."
            )
        del value["version"]
        return cls(work, **value)

    def piece(self, number: int) -> Piece:
        """The piece of a number from 0 on."""
        with open(self.work / STARTS, "rb") as starts:
            starts.seek(8 * number)
            place = int.from_bytes(starts.read(8), "little")
        with open(self.work / PIECES, "rb") as lines:
            lines.seek(place)
            return _parsed(number, lines.readline())

    def __iter__(self) -> Iterator[Piece]:
        with open(self.work / PIECES, "rb") as lines:
            for number, line in enumerate(lines):
                yield _parsed(number, line)


def make(
    work: Path, files: Sequence[TextFile], options: Options, deciding: Mapping[str, Any], compares: bool = False
) -> Plan:
    """Cut the files into pieces and write the plan. deciding: what a start that goes on must share. compares: whether its
    selection looks for copies."""
    inputs = [Input.of(file) for file in files]
    total = sum(max(one.size, 0) for one in inputs)
    size = options.piece_bytes or min(max(total // PIECES_AT_LEAST, LEAST_BYTES), MOST_BYTES)
    starts, place = bytearray(), 0
    with write_whole(work / PIECES) as lines:
        for spans in _pieces(inputs, size, options.split):
            line = json.dumps([[one, span] for one, span in spans]).encode() + b"\n"
            starts += place.to_bytes(8, "little")
            place += lines.write(line)
    with write_whole(work / STARTS) as file:
        file.write(starts)
    selection = None if options.select is None else os.path.abspath(options.select)
    plan = Plan(work, len(starts) // 8, len(inputs), total, dict(deciding), selection, compares)
    value = {name: value for name, value in vars(plan).items() if name != "work"}
    with write_whole(work / PLAN) as file:
        file.write(json.dumps({"version": VERSION, **value}, indent=1).encode())
    return plan


def check_same(plan: Plan, files: Sequence[TextFile], deciding: Mapping[str, Any]) -> None:
    """Raises Changed with the first that differs, if the plan is of other options or of other files."""

    def differ(what: str) -> Changed:
        end = "Start it as it was, or throw the unfinished work away with --restart."
        return Changed(f"The unfinished work in {plan.work.parent} was begun with other {what}. {end}")

    for name in {**plan.options, **deciding}:
        before, now = (_told(options.get(name)) for options in (plan.options, deciding))
        if before != now:
            raise differ(f"options: --{name.replace('_', '-')} was {before}, and is {now}")
    planned = (one for piece in plan for one, span in piece.spans if span is None or not span.start)
    for file in files:
        known = next(planned, None)
        if known is None or (known.name, known.path) != (file.name, os.path.abspath(file.path)):
            raise differ(f"texts: {file.name} {'is new' if known is None else f'stands where {known.name} stood'}")
        if problem := difference(known):
            raise Changed(f"{problem} {MEND}")
    if (left := next(planned, None)) is not None:
        raise differ(f"texts: {left.name} is missing")


def _told(value: Any) -> str:
    return "the default" if value is None else str(value)


def state(path: str | Path) -> tuple[int, int]:
    """(bytes, time of the last change in nanoseconds) of a plain file, with the ids beside an index of them; else GONE."""
    try:
        found = [os.stat(path)]
        if kinds.kind_of(Path(path)) == kinds.MEGATRON:
            found.append(os.stat(Path(path).with_suffix(".bin")))
    except OSError:
        return GONE
    if not all(stat.S_ISREG(one.st_mode) for one in found):
        return GONE
    return sum(one.st_size for one in found), max(one.st_mtime_ns for one in found)


def difference(planned: Input) -> str:
    """In what a file is another than it was when the plan was made; empty if in nothing."""
    now = state(planned.path)
    if now == (planned.size, planned.time):
        return ""
    if now == GONE:
        return f"{planned.name} is gone since the work began."
    return f"{planned.name} has changed since the work began: {planned.size:,} bytes then, {now[0]:,} now."


def mark(path: Path, digest: bytes) -> None:
    """Let a digest of what a file holds stand as its time: standard input that is read again is the same file."""
    time = int.from_bytes(digest[:7], "little")
    os.utime(path, ns=(time, time))


def _pieces(inputs: Iterable[Input], size: int, split: str) -> Iterator[list[tuple[Input, Span | None]]]:
    spans: list[tuple[Input, Span | None]] = []
    room = size
    for one in inputs:
        cuts = _cuts(one, size, split)
        if spans and (one.size > room or cuts or len(spans) == MOST_FILES):
            yield spans
            spans, room = [], size
        if cuts:
            for span in cuts:
                yield [(one, span)]
        else:
            spans.append((one, None))
            room -= max(one.size, 0)
    if spans:
        yield spans


def _cuts(one: Input, size: int, split: str) -> list[Span]:
    """The parts of a file that is large enough to be read in parts; none of one that is read whole."""
    if one.size <= size or one.part == "test":
        return []
    if cutting.is_cut(one.file(), split):
        return list(cutting.cut(one.file(), one.size, size, split))
    return [Span(*file.span) for file in pieces_of(one.file()) if file.span is not None]


def _parsed(number: int, line: bytes) -> Piece:
    return Piece(number, tuple((Input(*one), Span(*span) if span else None) for one, span in json.loads(line)))
