"""Saving against the least it could take: how long training stalls beside a copy of the same bytes in memory, and how fast
the save is on the disk beside a plain sequential write of them, synced, into the same folder.

The copy goes to memory that was touched before, the write comes from memory that is there: both as fast as this machine
does it. Rounds alternate, since a disk's rate drifts.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from workload import layout_overrides, start_run, steps

from parallel.gradients import counts_once
from parallel.grid import Grid
from pretrain import runs
from pretrain.opening import folder_of
from pretrain.saving import Order, Saver
from pretrain.train import Run

# GPT-2 small's blocks: 93M parameters with the workload's vocabulary, 1.1 GB of float32 weights and moments
MODEL = {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "activation": "gelu-tanh", "positions": "learned"}
PIECE = 2**26  # bytes a write


class Times(NamedTuple):
    stall: float  # seconds that training stood still
    save: float  # seconds until all was on the disk


def measure(config: str, layout: str, rounds: int) -> dict[str, Any]:
    """In a rank: after one step, `rounds` of a copy, a plain write and a save. A first save is told of apart: it gets the
    memory that the later ones find."""
    run = start_run(config, layout_overrides(layout))
    next(steps(run))
    runs.claim_folder(run.config, run.grid, run.sources)
    parts = _own_parts(run)
    copies = [part.clone() for part in parts]
    saver = Saver(run.folder, run.grid)
    first = _save(run, saver)
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        copy = _slowest(run.grid, lambda: _copy(parts, copies))
        write = _slowest(run.grid, lambda: _write(copies, run.folder / f"plain-{run.grid.rank}.bin"))
        stall, save = _save(run, saver)
        found.append({"copy": copy, "write": write, "stall": stall, "save": save})
    size = torch.tensor(float(sum(4 * part.numel() for part in parts)))
    return {
        "bytes": int(run.grid.total(size).item()),
        "seconds": found,
        "stall / copy": _ratios(found, "stall", "copy"),
        "write / save": _ratios(found, "write", "save"),
        "first stall": first.stall,
    }


def _own_parts(run: Run) -> list[Tensor]:
    """What this rank writes of masters and moments: at ZeRO-0 its part of what every replica holds."""
    grid, parts = run.grid, []
    for share in run.engine.shares():
        if counts_once(share.parameter, grid.tensor.rank):
            ranks, rank = (grid.replica_size, grid.replica_rank) if share.replicated else (1, 0)
            first, end = (share.numel * r // ranks for r in (rank, rank + 1))
            parts += [flat[first:end] for flat in (share.master.detach(), *share.moments.values())]
    return parts


def _copy(parts: list[Tensor], copies: list[Tensor]) -> None:
    for part, held in zip(parts, copies, strict=True):
        held.copy_(part)


def _write(parts: list[Tensor], path: Path) -> None:
    with path.open("wb", buffering=0) as stream:
        for part in parts:
            data = memoryview(part.numpy()).cast("B")  # type: ignore[arg-type]
            for start in range(0, len(data), PIECE):
                stream.write(data[start : start + PIECE])
        os.fsync(stream.fileno())
    path.unlink()


def _save(run: Run, saver: Saver) -> Times:
    """A save as training does it, and its times; the checkpoint is removed."""
    about = runs.about(run.grid, run.sources.fingerprint, run.built.kernels, run.start.digest)
    order = Order(run.state, about, 1, lambda step: False, lambda: None)
    stall = _slowest(run.grid, lambda: saver.save(order, run.engine))
    rest = _slowest(run.grid, saver.wait)
    if run.grid.rank == 0:
        shutil.rmtree(folder_of(run.folder, run.state.step))
    run.grid.wait()
    return Times(stall, stall + rest)


def _slowest(grid: Grid, action: Callable[[], Any]) -> float:
    """Seconds from when all ranks begin until the last is done."""
    grid.wait()
    started = time.perf_counter()
    action()
    grid.wait()
    return time.perf_counter() - started


def _ratios(rounds: list[dict[str, float]], one: str, other: str) -> dict[str, float]:
    values = [times[one] / times[other] for times in rounds]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
