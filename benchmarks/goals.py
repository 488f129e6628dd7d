"""What is aimed at, beside what was found."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def aim(targets: list[dict[str, Any]], what: str, aimed: float, found: float, least: bool = False) -> None:
    """Add a line: `found` is to be at most what is aimed at, or at least."""
    met = found >= aimed if least else found <= aimed
    targets.append({"what": what, "aim": f"at {'least' if least else 'most'} {aimed:g}", "found": found, "met": met})


def table_of(targets: list[dict[str, Any]]) -> Table:
    table = Table()
    for place, column in enumerate(("what", "aim", "found", "met")):
        table.add_column(column, justify="left" if place < 2 else "right", no_wrap=place < 2)
    for target in targets:
        table.add_row(target["what"], target["aim"], f"{target['found']:.3g}", "yes" if target["met"] else "NO")
    return table
