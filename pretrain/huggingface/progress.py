"""A bar over bytes on a terminal; nothing elsewhere."""

from __future__ import annotations

import sys

from rich import progress as bars
from rich.console import Console


class Bar:
    """Use it as a context, and `add` what is done."""

    def __init__(self, words: str, total: int) -> None:
        columns = (bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
        self.bar = bars.Progress(
            words, *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        )
        self.task = self.bar.add_task("", total=total)

    def add(self, size: int) -> None:
        """So many bytes more."""
        self.bar.advance(self.task, size)

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
