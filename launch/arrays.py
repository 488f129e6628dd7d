"""Runs that are one array of Slurm's: several seeds of a config, or the trials of a sweep that was planned."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.config.folder import BEFORE_THE_RUN
from pretrain.errors import UserError

PLAN = "sweep.json"  # pretrain/sweep.py's: config, overrides of all trials, each trial's own, ...
MOST = 10_000  # of an array


class Member(NamedTuple):
    """One run of an array."""

    number: int
    folder: Path
    overrides: tuple[str, ...]  # its own, without run.dir

    @property
    def words(self) -> list[str]:
        return [*self.overrides, f"run.dir={json.dumps(str(self.folder))}"]


class Plan(NamedTuple):
    """A sweep's."""

    config: str
    overrides: list[str]
    trials: list[list[str]]


def of_seeds(text: str, run: Path) -> tuple[Member, ...]:
    """Of `1-4,7`. Raises UserError where it is no list of numbers."""
    return tuple(Member(seed, run / f"seed-{seed}", (f"run.seed={seed}",)) for seed in numbers(text))


def of_plan(plan: Plan, out: Path) -> tuple[Member, ...]:
    """The trials, where `pretrain sweep` looks for them."""
    width = len(str(len(plan.trials) - 1))
    folders = [out / "trials" / f"{number:0{width}d}" / "run" for number in range(len(plan.trials))]
    return tuple(Member(n, folder, tuple(plan.trials[n])) for n, folder in enumerate(folders))


def plan_in(folder: Path) -> Plan | None:
    """That of a sweep's folder; None where it is no such. Raises UserError where it cannot be read."""
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        config, overrides, trials, *_ = json.loads(path.read_text())
        found = Plan(str(config), list(map(str, overrides)), [list(map(str, trial)) for trial in trials])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no plan of a sweep: {error}") from None
    return found


def is_home(folder: Path) -> bool:
    """Whether nothing but seeds lies there."""
    return folder.is_dir() and all(
        path.name in BEFORE_THE_RUN or re.fullmatch(r"seed-\d+", path.name) for path in folder.iterdir()
    )


def numbers(text: str) -> list[int]:
    """1-3,7 -> [1, 2, 3, 7]"""
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", text, re.ASCII):
        raise UserError(f"--seeds: {text!r} is no list of seeds; write 1-4, or 1,5,7")
    found: dict[int, None] = {}
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not low <= high < low + MOST:
            raise UserError(f"--seeds: {part} is no range of at most {MOST:,} seeds")
        found |= dict.fromkeys(range(low, high + 1))
    return list(found)


def spelled(members: Sequence[Member], at_once: int | None) -> str:
    """As sbatch takes it: 1-4,7%2"""
    parts: list[list[int]] = []
    for number in sorted(member.number for member in members):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    ranges = (str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return ",".join(ranges) + (f"%{at_once}" if at_once else "")
