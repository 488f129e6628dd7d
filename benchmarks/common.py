"""What every benchmark's result says of its machine, and how ratios are told."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SHARDS = REPOSITORY / "shards"


def no_shards(folder: Path) -> bool:
    """Say how to make the shards, if there are none in the folder."""
    if (folder / "train" / "manifest.json").is_file():
        return False
    print(f"error: no shards in {folder}; make them: python -m pretrain prepare --stdlib --out shards", file=sys.stderr)
    return True


def about(script: str, packages: Sequence[str], threads: int, sampled: str) -> dict[str, Any]:
    """The command, the hardware and the versions; `sampled` says when in the run the numbers were taken."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "command": shlex.join(["python", f"benchmarks/{script}.py", *sys.argv[1:]]),
        "hardware": {"cpu": cpu or platform.machine(), "cores": len(os.sched_getaffinity(0)), "threads": threads},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "sampled": sampled,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def ratios(rounds: Sequence[dict[str, float]], name: str, others: Sequence[str]) -> dict[str, dict[str, float]]:
    """Speed of `name` over that of each other one: median and range of the ratios within a round."""
    found = {}
    for other in others:
        values = [speeds[name] / speeds[other] for speeds in rounds]
        found[f"{name} / {other}"] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found
