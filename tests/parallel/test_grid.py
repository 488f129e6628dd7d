"""Each rank's place, and who is in its groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.grid import start_grid, stop_grid
from parallel.layout import Layout
from tests.distributed import run_ranks


def places(layouts: list[str]) -> list[dict[str, Any]]:
    """Where this rank is under each layout, one after the other in the same process."""
    found = []
    for text in layouts:
        grid = start_grid(Layout.parse(text), 60)
        groups = (grid.tensor.group, grid.replica_group, grid.pipeline_group, grid.model_group, grid.embedding_group)
        found.append(
            {
                "place": (grid.stage, grid.data_rank, grid.tensor.rank),
                "groups": [None if group is None else dist.get_process_group_ranks(group) for group in groups],
                "edges": (grid.first_stage, grid.last_stage, grid.reads_loss),
                "total": grid.total(torch.tensor([float(grid.rank)])).item(),
                "on host": grid.total_on_host(grid.rank + 0.5, grid.rank == 3),
                "first": grid.from_first(f"rank {grid.rank}"),
            }
        )
        grid.wait()
    stop_grid()
    assert not dist.is_initialized()
    return found


LAYOUTS = ["tp=2,pp=2,dp=2", "pp=4,dp=2", "tp=4,dp=2", "tp=2,pp=4", "dp=8"]


def test_tensor_ranks_are_neighbours_then_data_then_pipeline() -> None:
    ranks = run_ranks(8, places, LAYOUTS)
    for number, text in enumerate(LAYOUTS):
        layout = Layout.parse(text)
        T, D, P = layout.tensor, layout.data, layout.pipeline
        for rank in range(8):
            found = ranks[rank][number]
            tensor, data, stage = rank % T, rank // T % D, rank // T // D
            assert found["place"] == (stage, data, tensor), text
            tensor_group, data_group, pipeline_group, model_group, embedding_group = found["groups"]
            assert tensor_group == [t + T * (data + D * stage) for t in range(T)]
            assert data_group == [tensor + T * (d + D * stage) for d in range(D)]
            assert pipeline_group == [tensor + T * (data + D * p) for p in range(P)]
            assert model_group == [t + T * (data + D * p) for p in range(P) for t in range(T)]
            ends = [tensor + T * (data + D * p) for p in (0, P - 1)]
            assert embedding_group == (ends if P > 1 and stage in (0, P - 1) else None)
            assert found["edges"] == (stage == 0, stage == P - 1, stage == P - 1 and tensor == 0)
            assert (found["total"], found["on host"], found["first"]) == (28.0, [32.0, 1.0], "rank 0")
        assert sum(ranks[rank][number]["edges"][2] for rank in range(8)) == D, "each replica's loss is read once"


def test_a_layout_of_another_size_is_not_started() -> None:
    with pytest.raises(AssertionError, match="tp2 x dp2, zero 0 needs 4 processes, there are 2"):
        run_ranks(2, places, ["tp=2,dp=2"])
