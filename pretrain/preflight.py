"""Whether the hosts of a run are fit for it, before a model is built; and if not, which one is to be left out.

Who cannot be reached is told when the ranks meet (`parallel.meeting`), who was given something else when they compare it
(`pretrain.agreement`). Here each rank then tells what it has and needs, all ranks look at the same list, and come to the same
findings (`pretrain.fitness`). `train` does this whenever it starts, and goes on where the finding only may spoil the run; the
command `preflight` does it alone, and with any finding ends with exit code 5.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from parallel.grid import Grid, start_grid, stop_grid
from parallel.layout import Layout, rank_and_world
from pretrain import agreement, fitness, links, resources
from pretrain.activations import Frozen
from pretrain.build import choose_precision, stage_layers
from pretrain.checkpoint import list_steps
from pretrain.config.run import Config
from pretrain.data.sources import Sources
from pretrain.errors import Unfit
from pretrain.fitness import Seen, Verdict
from pretrain.heartbeat import Heartbeat
from pretrain.memory import memory
from pretrain.runs import open_config
from pretrain.sizes import parameters_of
from pretrain.trainable import frozen_weights

ROUNDS = 3  # of comparing clocks; the best counts, since a rank may leave a barrier late
BYTES_SAVED = 12  # of a weight that learns: float32 master and two moments; 4 of one that does not
MEGABYTE = 1e6


def main(args: argparse.Namespace) -> int:
    """`python -m pretrain preflight`. Raises UserError for a mistake, and where the ranks were not given the same."""
    rank, world = rank_and_world()
    config = open_config(args.config, args.overrides, world)
    sources = Sources.open(config)
    with Heartbeat(rank, world, args.timeout) as heartbeat:
        grid = join(Layout.of(config.parallel, world), args.timeout)
        heartbeat.start()
        agreement.check(config, sources, grid, {})
        floor = config.parallel.bandwidth_floor or args.floor
        verdict = examine(choose_precision(config, grid), sources, grid, floor * MEGABYTE)
        stop_grid()
    if rank == 0:
        print(json.dumps(fitness.as_json(verdict)) if args.json else "\n".join(fitness.summary(verdict)))
        if verdict.findings:
            print(f"error: {fitness.told(verdict)}", file=sys.stderr)
    return Unfit.exit_code if verdict.findings else 0


def join(layout: Layout, timeout: float) -> Grid:
    """`parallel.grid.start_grid`, where this host has a device for this rank. Raises Unfit elsewhere; the others then say
    that the rank has not come."""
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if torch.cuda.is_available() and place >= count:
        raise Unfit(
            f"{platform.node()} has {count} GPU{'s' if count > 1 else ''}, none for the rank that is number {place + 1} "
            "there; start fewer ranks on it, or go without it: --exclude " + platform.node()
        )
    return start_grid(layout, timeout)


def examine(config: Config, sources: Sources, grid: Grid, floor: float | None) -> Verdict:
    """What is wrong with the hosts, the same on every rank. floor: bytes a second that each group must reach. precision.compute
    must be decided. Collective."""
    frozen = sum(map(math.prod, frozen_weights(config, sources.sizes).values()))
    seen = [Seen(*told) for told in grid.from_all(tuple(look(config, sources, grid, frozen)))]
    measured: list[dict[str, float]] = grid.from_all(links.rates(grid) if grid.world > 1 else {})
    rates = {name: min(one[name] for one in measured) for name in measured[0]}
    slow = {name: rate for name, rate in rates.items() if floor is not None and rate < floor}
    needs_disk = needed_disk(config, sources, frozen)
    found = fitness.findings(seen, needs_disk)
    if slow and floor is not None:
        found += fitness.of_links(seen, slow, floor, links.slow_ranks(links.around(grid), floor))
    return Verdict(seen, rates, needs_disk, found)


def check(config: Config, sources: Sources, grid: Grid) -> list[str]:
    """As `train` begins: warnings, on rank 0. Raises Unfit, and SystemExit on other ranks than the first, for findings
    that would fail the run. Collective."""
    floor = config.parallel.bandwidth_floor
    verdict = examine(config, sources, grid, None if floor is None else floor * MEGABYTE)
    failing = [finding for finding in verdict.findings if finding.check not in fitness.SPOILING]
    if failing:
        grid.wait()
        if grid.rank == 0:
            raise Unfit(fitness.told(verdict._replace(findings=failing)))
        raise SystemExit(Unfit.exit_code)
    return [f"{finding.host}: {finding.words}" for finding in verdict.findings] if grid.rank == 0 else []


# -- what a rank sees ------------------------------------------------------------------------------------------------


def look(config: Config, sources: Sources, grid: Grid, frozen: int) -> Seen:
    """Of this rank. Collective: clocks are compared."""
    on_gpu = grid.device.type == "cuda"
    needs, of_host = needed_memory(config, sources, grid, frozen)
    free = resources.free_memory()
    disk, unwritable = resources.free_disk(Path(config.run.dir))
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    return Seen(
        rank=grid.rank,
        host=platform.node(),
        device=torch.cuda.get_device_name(grid.device) if on_gpu else "cpu",
        gpu=str(torch.cuda.get_device_properties(grid.device).uuid) if on_gpu else "",
        right=resources.computes_right(grid.device),
        broken=resources.broken_devices() if on_gpu and first else [],
        needs=needs,
        has=resources.free_on_device(grid.device) if on_gpu else free,
        needs_of_host=of_host if on_gpu else needs,
        host_has=free,
        disk=disk,
        unwritable=unwritable,
        clock=ahead(grid),
    )


def ahead(grid: Grid) -> float:
    """Seconds that this host's clock is ahead of the middle one."""
    off = []
    for _ in range(ROUNDS if grid.world > 1 else 0):
        grid.wait()
        ours = now()
        off.append(ours - statistics.median_low(grid.from_all(ours)))
    return min(off, key=abs, default=0.0)


def now() -> float:
    return time.time()


def needed_memory(config: Config, sources: Sources, grid: Grid, frozen: int) -> tuple[int, int]:
    """Bytes at the highest moment, on the device and on its host, by the formula; of a part of weights that do not learn, the
    rank's even share."""
    layout, vocabulary = grid.layout, sources.sizes.vocab_size
    layers = stage_layers(config, vocabulary)
    still = Frozen(frozen // layout.tensor // layout.pipeline, 0)
    found = memory(config, layout, layers, vocabulary, grid.stage, frozen=still)
    return (found.peak - found.on_host, found.on_host) if grid.device.type == "cuda" else (found.peak, 0)


def needed_disk(config: Config, sources: Sources, frozen: int) -> int:
    """Bytes that checkpoints will take beyond those there: the last ones, the best one, and one that is being written."""
    count = parameters_of(config, sources.sizes)
    size = BYTES_SAVED * (count - frozen) + 4 * frozen
    kept = config.checkpoint.keep_last + 1 + (config.checkpoint.keep_best and config.data.has_validation)
    return size * max(kept - len(list_steps(Path(config.run.dir))), 1)
