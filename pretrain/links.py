"""How fast the ranks' groups are, and, where one is slow, whose link it is.

A group's rate is that of its bus, 2 (n - 1) / n of the bytes a second that an all-reduce of n ranks moves (as nccl-tests have
it), which does not depend on n where the links are alike. All ranks of a group see the same, so it cannot say who is slow; then
each rank sends to the next one around, and a slow rank is at an end of every slow link.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.grid import Grid

ELEMENTS = 2**18  # float32: a mebibyte
TIMES = 3  # of which the best counts


def rates(grid: Grid, elements: int = ELEMENTS) -> dict[str, float]:
    """Bytes a second of each group that this rank is in, after a first exchange, which opens connections. Collective."""
    layout, world = grid.layout, dist.group.WORLD
    groups = {
        "world": (world, grid.world),
        "tensor": (grid.tensor.group, layout.tensor),
        "context": (grid.context.group, layout.context),
        "replicas": (grid.replica_group, grid.replica_size),
        "pipeline": (grid.pipeline_group, layout.pipeline),
    }
    return {
        name: _rate(grid.device, group, size, elements)
        for name, (group, size) in groups.items()
        if size > 1 and (name == "world" or size < grid.world)
    }


def _rate(device: torch.device, group: Any, size: int, elements: int) -> float:
    values = torch.ones(elements, device=device)

    def reduce() -> None:
        dist.all_reduce(values, group=group)

    dist.barrier(group=group)
    reduce()
    assert values[0].item() == size, "a group does not sum"
    seconds = min(_seconds(reduce, values) for _ in range(TIMES))
    return 2 * (size - 1) / size * values.nbytes / seconds


def _seconds(action: Callable[[], Any], waits: torch.Tensor) -> float:
    started = time.perf_counter()
    action()
    waits[0].item()  # for the device
    return time.perf_counter() - started


def around(grid: Grid, elements: int = ELEMENTS) -> list[float]:
    """Bytes a second from each rank to the next, of which the last is to rank 0, on every rank. Collective."""
    sent, received = torch.ones(elements, device=grid.device), torch.empty(elements, device=grid.device)
    following, before = (grid.rank + 1) % grid.world, (grid.rank - 1) % grid.world

    def receive() -> float:
        ops = [dist.P2POp(dist.isend, sent, following), dist.P2POp(dist.irecv, received, before)]
        dist.barrier()  # so that no time is of the one before
        started = time.perf_counter()
        works = dist.batch_isend_irecv(ops)
        works[-1].wait()
        received[0].item()
        seconds = time.perf_counter() - started
        for work in works[:-1]:  # the next rank's time, not ours; gloo hangs if it waits twice for one
            work.wait()
        return seconds

    rate = received.nbytes / min(receive() for _ in range(1 + TIMES))
    into: list[float] = grid.from_all(rate)
    return into[1:] + into[:1]


def slow_ranks(links: Sequence[float], floor: float) -> list[int]:
    """Those at both ends of whose links all is slow; where no rank is, or all are, those of the slow links. links: from each
    rank to the next, around."""
    world = len(links)
    slow = [rank for rank, rate in enumerate(links) if rate < floor]
    ends = Counter(end for rank in slow for end in {rank, (rank + 1) % world})
    both = [rank for rank, count in ends.items() if count == 2]
    return sorted(both if 0 < len(both) < world else ends)
