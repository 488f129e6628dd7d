"""What prepare shows: a bar on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import progress as bars
from rich.console import Console
from rich.table import Table

from pretrain.data.documents import TextFile

if TYPE_CHECKING:
    from pretrain.data.preparing.options import Report

SECONDS_A_LINE = 10.0


def total_of(files: Sequence[TextFile]) -> int | None:
    """Bytes of the files' text; None where compression or JSON around it hides how many."""
    whole = not any(file.is_compressed or file.is_json_lines for file in files)
    return sum(file.path.stat().st_size for file in files if file.path.exists()) if whole else None


class Progress:
    """Counts what is done, of `total` bytes; where these are unknown (None) the bar says so. verb: what is done, in a word."""

    def __init__(self, total: int | None, say: Callable[[str], None], verb: str = "Tokenizing") -> None:
        self.total, self.say, self.verb = total, say, verb
        self.bytes = self.tokens = 0
        self.start = self.said = time.monotonic()
        self.bar: bars.Progress | None = None
        if sys.stderr.isatty():
            columns = (bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
            self.bar = bars.Progress(verb, *columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=self.total)

    def add(self, tokens: int, size: int) -> None:
        """So many more are done."""
        self.bytes += size
        self.tokens += tokens
        if self.bar is not None:
            self.bar.advance(self.task, size)
        elif time.monotonic() - self.said >= SECONDS_A_LINE:
            self.said = time.monotonic()
            of = f" of {self.total / 1e6:.0f}" if self.total else ""
            rate = self.bytes / 1e6 / (self.said - self.start)
            done = f" {self.tokens:,} tokens," if self.tokens else ""
            self.say(f"{self.verb}: {self.bytes / 1e6:.0f}{of} MB,{done} {rate:.1f} MB/s")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def print_report(report: Report, out: str | Path) -> None:
    """The table at the end, and what was skipped."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table("", *("documents", "tokens", "bytes", "bytes per token"), title=_printable(str(out)))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, part in report.parts.items():
        if part.documents:
            ratio = f"{part.text_bytes / part.tokens:.2f}"
            table.add_row(name, f"{part.documents:,}", f"{part.tokens:,}", f"{part.text_bytes:,}", ratio)
    console.print(table)
    for name, part in report.parts.items():
        if part.padding:
            console.print(f"Of {name}'s rows {part.padding / part.tokens:.2%} is filler.")
    console.print(f"Vocabulary {report.vocab_size:,}. Skipped: {sum(report.skipped.values()):,}.")
    for reason, count in sorted(report.skipped.items()):
        console.print(f"  {count:,} {reason}, such as {_printable(report.examples[reason][0])}")
    for reason, count in sorted(report.dropped.items(), key=lambda item: -item[1]):
        console.print(f"  {count:,} not selected: {reason}")
    if report.altered:
        example = _printable(report.altered_examples[0])
        console.print(f"{report.altered:,} documents do not decode to themselves, such as {example}")


def _printable(name: str) -> str:
    """A file's name may hold bytes that are no text, or a terminal's commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
