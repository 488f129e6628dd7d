"""Ranks that are to train together must have been given the same: config, code, packages, data.

They compare one hash when they have met, before a model is built. Only where the hashes differ are the facts behind them
exchanged, so that the message can say which rank has what.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from parallel.grid import Grid
from pretrain.config.run import Config
from pretrain.data.manifest import canonical
from pretrain.data.sources import Sources
from pretrain.errors import UserError
from pretrain.runs import PACKAGES

CODE = ("kernels", "launch", "parallel", "pretrain")
DIGITS = 12  # of a SHA-256 that is shown
LINES = 20  # differences told at most
FINGERPRINT = "data fingerprint"

Facts = dict[str, str]  # what is compared, under a name for people


def check(config: Config, sources: Sources, grid: Grid, options: Facts) -> None:
    """Returns where all ranks agree. Elsewhere all end with exit code 2: rank 0 and those that differ from the most by a
    UserError that says who differs in what, the others silently. Collective."""
    if grid.world == 1:
        return
    ours = {**facts(config, sources), **options}
    if len(set(grid.from_all(hashlib.sha256(canonical(ours)).hexdigest()))) == 1:
        return
    everyone = grid.from_all(ours)
    hosts = grid.from_all(platform.node())
    with contextlib.suppress(RuntimeError):  # so that none leaves while another still reads from it
        grid.wait()
    differing, message = told(everyone, hosts)
    if grid.rank == 0 or grid.rank in differing:
        raise UserError(message)
    raise SystemExit(2)


def facts(config: Config, sources: Sources) -> Facts:
    """All that the ranks must have the same of."""
    return {
        **{f"config {path}": repr(value) for path, value in _fields(config.model_dump(mode="json"))},
        **{f"version of {name}": version(name) for name in PACKAGES},
        "version of python": platform.python_version(),
        **dict(_code(Path(__file__).resolve().parent.parent)),
        **dict(_data(config, sources)),
    }


def _fields(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _code(home: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(path for package in CODE for path in (home / package).rglob("*.py")):
        yield f"code {path.relative_to(home)}", hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS]


def _data(config: Config, sources: Sources) -> Iterator[tuple[str, str]]:
    """The fingerprint of all data, and the manifests that it is made of."""
    yield FINGERPRINT, sources.fingerprint[:DIGITS]
    held_out = {f"data.train.{name}.validation": stream for name, stream in sources.held_out.items()}
    for name, stream in {"data.train": sources.train, "data.validation": sources.validation, **held_out}.items():
        for manifest in getattr(stream, "manifests", ()):  # labelled examples have none
            yield f"{name}, {manifest.folder}/manifest.json", manifest.fingerprint[:DIGITS]


def told(everyone: Sequence[Facts], hosts: Sequence[str]) -> tuple[set[int], str]:
    """The ranks that differ from the most, and the message. Where as many say one thing as another, rank 0 is right."""
    differing: set[int] = set()
    lines: list[str] = []
    names = dict.fromkeys(name for ours in everyone for name in ours)
    for name in sorted(names, key=lambda name: name == FINGERPRINT):
        if name == FINGERPRINT and lines:  # it follows from the rest
            continue
        values = [ours.get(name, "nothing") for ours in everyone]
        usual = Counter(values).most_common(1)[0][0] if _has_majority(values) else values[0]
        others = [rank for rank, value in enumerate(values) if value != usual]
        if others:
            differing.update(others)
            lines.append(f"  {name}: {_holders(values, others)}, {usual} elsewhere")
    if len(lines) > LINES:
        lines[LINES:] = [f"  and {len(lines) - LINES} more"]
    who = ", ".join(f"{rank} ({hosts[rank]})" for rank in sorted(differing))
    several = len(differing) > 1
    return differing, "\n".join(
        [
            f"the ranks were not given the same, so none has started: "
            f"rank{'s' if several else ''} {who} differ{'' if several else 's'} from the others:",
            *lines,
            "Start every rank with the same command, code, packages and shards.",
        ]
    )


def _has_majority(values: Sequence[str]) -> bool:
    counts = [count for _, count in Counter(values).most_common(2)]
    return len(counts) == 1 or counts[0] > counts[1]


def _holders(values: Sequence[str], ranks: Iterable[int]) -> str:
    """`0.2 on ranks 1, 3, 0.5 on rank 2`"""
    by_value: dict[str, list[str]] = {}
    for rank in ranks:
        by_value.setdefault(values[rank], []).append(str(rank))
    return ", ".join(
        f"{value} on rank{'s' if len(held) > 1 else ''} {', '.join(held)}" for value, held in by_value.items()
    )
