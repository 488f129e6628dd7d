"""What benchmarks/layouts.py found, as tables for a terminal, and whether it is within what was aimed at."""

from __future__ import annotations

import statistics
from typing import Any

from goals import aim, table_of
from overhead import by_package
from rich.console import Console
from rich.table import Table

WIDTH = 170  # columns: the tables are wide, and a terminal wraps what a file keeps
SLOWER, STALL, DISK, METADATA, MEMORY = 0.03, 1.3, 0.7, 10.0, 0.15
AXES = ("tensor", "context", "pipeline", "data", "embedding", "model", "world", "other")


def show(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Print what there is; returns the targets: what, aim, found, met."""
    console = Console(highlight=False, markup=False, width=WIDTH)
    hardware, versions = result["hardware"], result["versions"]
    cores = hardware["cores"]
    console.print(f"{hardware['cpu']}, {cores} cores, torch {versions['torch']}, deepspeed {versions['deepspeed']}")
    targets: list[dict[str, Any]] = []
    if "overhead" in result:
        rows = [row for row in result["overhead"] if "failed" not in row]
        console.print(_overhead(rows, cores), _waits(rows, cores))
    if "loop" in result:
        console.print(_loop(result["loop"], targets))
    if "checkpoint" in result:
        console.print(_checkpoint(result["checkpoint"], targets))
    if "metadata" in result:
        _metadata(console, result["metadata"], targets)
    if "memory" in result:
        console.print(_memory(result["memory"], targets))
    console.print(table_of(targets))
    return targets


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """The first `left` columns are text."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(
            column, justify="left" if place < left else "right", no_wrap=place < left or column == "most in"
        )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def _named(row: dict[str, Any], cores: int) -> str:
    """The layout; starred where its processes share cores."""
    return row["layout"] + (" *" if row["processes"] > cores else "")


def _overhead(rows: list[dict[str, Any]], cores: int) -> Table:
    columns = ("engine", "DeepSpeed", "megatron", "torch", "python", "most in")
    table = _table(
        f"Milliseconds a step, mean over the ranks (* more processes than the {cores} cores); overhead under the profiler; "
        "right: Python's own time by package, under cProfile",
        *("layout", "step", "profiled", "compute", "commun.", "overhead", "share", *columns),
    )
    for row in rows:
        packages = by_package(row["python"])
        beyond = {name: seconds for name, seconds in row["python"].items() if not name.startswith("torch")}
        most = max(beyond, key=lambda name: beyond[name])
        table.add_row(
            _named(row, cores),
            *(_ms(row[name]) for name in ("step", "profiled_step", "computation", "communication", "overhead")),
            f"{row['overhead'] / row['profiled_step']:.1%}",
            *(_ms(packages.get(name, 0.0)) for name in ("engine", "deepspeed", "megatron", "torch", "python")),
            f"{most.removeprefix('deepspeed.runtime.')} {_ms(beyond[most])}",
        )
    return table


def _waits(rows: list[dict[str, Any]], cores: int) -> Table:
    table = _table(
        "Exposed communication: share of a step that a rank waits, by group, mean over the ranks (* oversubscribed: most of "
        "it is other ranks' computing)",
        *("layout", "all", *AXES),
    )
    for row in rows:
        if row["processes"] > 1:
            shares = [row["waits"].get(axis, 0.0) / row["step"] for axis in AXES]
            table.add_row(_named(row, cores), *(f"{share:.1%}" if share else "" for share in (sum(shares), *shares)))
    return table


def _loop(found: dict[str, Any], targets: list[dict[str, Any]]) -> Table:
    table = _table(
        "The engine at ZeRO-0 and one process against the bare loop of the same model: how much slower (range)",
        *("", "engine ms", "bare ms", "slower", "range", "losses differ by"),
    )
    for name, one in found.items():
        if "failed" in one:
            continue
        times = [statistics.median(times[loop] for times in one["seconds"]) for loop in ("engine", "bare")]
        slower = one["slower"]
        spread = f"{slower['min']:+.1%} to {slower['max']:+.1%}"
        parts = f"{one['largest_relative_difference_of_loss']:.1e}"
        table.add_row(name, *map(_ms, times), f"{slower['median']:+.1%}", spread, parts)
        aim(targets, f"{name} engine slower than the bare loop", SLOWER, slower["median"])
    return table


def _checkpoint(rows: list[dict[str, Any]], targets: list[dict[str, Any]]) -> Table:
    table = _table(
        "A checkpoint, median of the rounds: seconds",
        *(
            "layout",
            "GB",
            "copy",
            "stall",
            "stall / copy",
            "range",
            "plain write",
            "save",
            "save's rate / disk's",
            "range",
        ),
    )
    for row in rows:
        if "failed" in row:
            continue
        copy, stall, write, save = (
            statistics.median(times[name] for times in row["seconds"]) for name in ("copy", "stall", "write", "save")
        )
        stalled, rate = row["stall / copy"], row["write / save"]
        table.add_row(
            *(row["layout"], f"{row['bytes'] / 1e9:.2f}", f"{copy:.2f}", f"{stall:.2f}", f"{stalled['median']:.2f}"),
            *(f"{stalled['min']:.2f} to {stalled['max']:.2f}", f"{write:.2f}", f"{save:.2f}", f"{rate['median']:.0%}"),
            f"{rate['min']:.0%} to {rate['max']:.0%}",
        )
        aim(targets, f"{row['layout']}: stall / copy", STALL, stalled["median"])
        aim(targets, f"{row['layout']}: save's rate / disk's", DISK, rate["median"], least=True)
    return table


def _metadata(console: Console, found: dict[str, Any], targets: list[dict[str, Any]]) -> None:
    seconds = found["open_seconds"] + found["send_seconds"] + found["plan_seconds"]
    console.print(
        f"Checkpoint of {found['ranks']:,} ranks, {found['parameters'] / 1e9:.1f}B parameters, {found['boxes']:,} boxes: open "
        f"{found['open_seconds']:.2f} s, pack and unpack for the other ranks {found['send_seconds']:.2f} s, plan a rank's read "
        f"{found['plan_seconds']:.2f} s; it opens {found['files_opened']} of {found['files']:,} files, {found['files_needed']} "
        f"hold its boxes"
    )
    aim(targets, "open and plan a checkpoint of 1,024 ranks, seconds", METADATA, seconds)
    aim(targets, "files opened that are not needed", 0, found["times_opened"] - found["files_needed"])


def _memory(rows: list[dict[str, Any]], targets: list[dict[str, Any]]) -> Table:
    parts = ("weights", "optimizer", "gradients", "buffers", "activations", "working")
    table = _table(
        "Peak memory of tensors, MiB: measured beside the formula and its parts, each layout's rank furthest from it",
        *("layout", "rank", "measured", "formula", "off by", *parts, "moment"),
    )
    worst = 0.0
    for row in rows:
        if "failed" in row:
            continue
        off = [one["expected"] / one["measured"] - 1 for one in row["ranks"]]
        rank = max(range(len(off)), key=lambda rank: abs(off[rank]))
        one, worst = row["ranks"][rank], max(worst, abs(off[rank]))
        numbers = (one["measured"], one["expected"])
        table.add_row(
            *(row["layout"], str(rank), *(f"{size / 2**20:,.1f}" for size in numbers), f"{off[rank]:+.1%}"),
            *(f"{one['formula'][part] / 2**20:,.1f}" for part in parts),
            one["formula"]["moment"],
        )
    if rows:
        aim(targets, "largest difference of memory and formula", MEMORY, worst)
    return table
