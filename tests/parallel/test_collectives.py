"""Watching collectives: each call that issues or waits is seen once, with its group, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

from parallel.collectives import Watch
from parallel.grid import start_grid
from parallel.layout import Layout
from tests.distributed import run_ranks


def seen_by_a_watch() -> dict[str, Any]:
    """In one of two ranks: the groups of the calls seen, and what the ranks' numbers came to."""
    grid = start_grid(Layout(tensor=2), 60)
    before = dict(vars(ProcessGroup)), dict(vars(Work))
    seen: list[str] = []

    @contextmanager
    def around(group: str) -> Iterator[None]:
        seen.append(group)
        yield

    world, tensor = dist.group.WORLD, grid.tensor.group
    assert world is not None
    calls: dict[str, list[str]] = {}

    def note(name: str) -> None:
        calls[name] = list(seen)
        seen.clear()

    value = torch.tensor(float(grid.rank + 1))
    with Watch(around):
        dist.all_reduce(value, group=tensor)
        note("all_reduce")
        work = dist.all_reduce(value, async_op=True)
        note("issued")
        work.wait()
        note("waited")
        other = torch.zeros(())
        if grid.rank == 0:
            dist.send(value, 1)
        else:
            dist.recv(other, 0)
        note("exchanged")
        dist.barrier()
        note("barrier")
    dist.all_reduce(value)
    note("after")
    left = (dict(vars(ProcessGroup)), dict(vars(Work))) != before
    names = {world.group_name: "world", tensor.group_name: "tensor"}
    calls = {name: [names[group] for group in groups] for name, groups in calls.items()}
    return {"calls": calls, "sum": value.item(), "left": left}


def test_each_call_is_seen_with_its_group_and_nothing_is_left_behind() -> None:
    """all_reduce of 1 + 2, of 3 + 3 and of 6 + 6. One that is not asynchronous issues and waits."""
    for found in run_ranks(2, seen_by_a_watch):
        assert found["calls"] == {
            "all_reduce": ["tensor", "tensor"],
            "issued": ["world"],
            "waited": ["world"],
            "exchanged": ["world", "world"],
            "barrier": ["world", "world"],
            "after": [],
        }
        assert found["sum"] == 12 and not found["left"]
