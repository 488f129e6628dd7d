"""What every benchmark's result says of its machine, and how ratios are told."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARDS = REPOSITORY / "shards"
WAIT = 20_000_000  # cycles, some ten milliseconds: the host is done with its launches by then


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


def arguments(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """What the benchmarks that run on a GPU too have in common: --device, --rounds, --json."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"(default: {default})")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each (default: {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    return parser


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What a call takes: of the device, by its events, behind a wait that lets the host get ahead; on a CPU by the clock."""
    if device.type == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def ratios(rounds: Sequence[dict[str, float]], name: str, others: Sequence[str]) -> dict[str, dict[str, float]]:
    """Speed of `name` over that of each other one: median and range of the ratios within a round."""
    found = {}
    for other in others:
        values = [speeds[name] / speeds[other] for speeds in rounds]
        found[f"{name} / {other}"] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found
