"""This process's place among the ranks, and the process groups of each axis.

Ranks are laid out by megatron-core's `parallel_state` in the order tensor, context, data, pipeline (tensor ranks are
neighbours). A run of one process has no groups but the world's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kernels.vector_math import settle
from parallel.axes import ContextAxis, TensorAxis
from parallel.layout import Layout, rank_and_world
from parallel.meeting import meet


@dataclass(frozen=True)
class Grid:
    layout: Layout
    rank: int
    world: int
    device: torch.device
    tensor: TensorAxis
    context: ContextAxis
    data_rank: int  # which samples
    stage: int  # pipeline rank
    replica_rank: int  # among the ranks that hold the same weights: data x context
    replica_group: Any  # None stands for the world where there is one process
    model_group: Any  # tensor x pipeline: the ranks that together hold one copy of the model
    pipeline_group: Any
    embedding_group: Any  # first and last stage, which both hold a tied embedding; None elsewhere
    host_group: Any = None  # all ranks, for what lies in the hosts' memory; None stands for the world

    @property
    def data_size(self) -> int:
        return self.layout.data

    @property
    def replica_size(self) -> int:
        """Ranks that hold the same weights, and share the optimizer under ZeRO."""
        return self.layout.data * self.layout.context

    @property
    def first_stage(self) -> bool:
        return self.stage == 0

    @property
    def last_stage(self) -> bool:
        return self.stage == self.layout.pipeline - 1

    @property
    def reads_loss(self) -> bool:
        """Whether this rank has a part of the loss that no other has."""
        return self.last_stage and self.tensor.rank == 0

    @property
    def reads_data(self) -> bool:
        """One rank of those that have the same samples: it speaks for them in sums over the data-parallel axis."""
        return self.reads_loss and self.context.rank == 0

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place, of what each rank counts once."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def total_on_host(self, *values: float) -> list[float]:
        """Sums over all ranks of what each rank's host knows; no device is waited for. Collective."""
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(numbers, group=self.host_group)
        return numbers.tolist()

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank; the others' is ignored."""
        held = [value]
        if self.world > 1:
            dist.broadcast_object_list(held)
        return held[0]

    def from_all(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()


def pick_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start_grid(layout: Layout, timeout_seconds: float) -> Grid:
    """Join the other processes and build the groups. A second call in one process rebuilds them for another layout.

    Raises NotMet where the others do not come, RuntimeError (from torch) when they stop answering within the timeout.
    """
    settle()
    device = pick_device()
    if not dist.is_initialized():
        _join(device, timedelta(seconds=timeout_seconds))
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == layout.size, f"{layout} needs {layout.size} processes, there are {world}"
    if world == 1:
        return Grid(layout, 0, 1, device, TensorAxis(), ContextAxis(), 0, 0, 0, None, None, None, None)
    return _parallel_grid(layout, rank, world, device, timedelta(seconds=timeout_seconds))


def _join(device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if rank_and_world()[1] == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        rank, world = rank_and_world()
        store = meet(rank, world, device.type, timeout.total_seconds())
        bound = device if device.type == "cuda" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound)


def _parallel_grid(layout: Layout, rank: int, world: int, device: torch.device, timeout: timedelta) -> Grid:
    from megatron.core import parallel_state as state

    from parallel import cpu

    cpu.install()
    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()
    state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=timeout.total_seconds() / 60,  # whole or not: it goes into a timedelta
    )
    tensor = TensorAxis(
        layout.tensor,
        state.get_tensor_model_parallel_rank(),
        state.get_tensor_model_parallel_group(),
        sequence=layout.sequence,
    )
    at_edge = layout.pipeline > 1 and (state.is_pipeline_first_stage() or state.is_pipeline_last_stage())
    return Grid(
        layout=layout,
        rank=rank,
        world=world,
        device=device,
        tensor=tensor,
        context=ContextAxis(layout.context, state.get_context_parallel_rank(), state.get_context_parallel_group()),
        data_rank=state.get_data_parallel_rank(),
        stage=state.get_pipeline_model_parallel_rank(),
        replica_rank=state.get_data_parallel_rank(with_context_parallel=True),
        replica_group=state.get_data_parallel_group(with_context_parallel=True),
        model_group=state.get_model_parallel_group(),
        pipeline_group=state.get_pipeline_model_parallel_group(),
        embedding_group=state.get_embedding_group() if at_edge else None,
        # NCCL moves nothing but a GPU's memory.
        host_group=dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else None,
    )


def stop_grid() -> None:
    """Leave the groups, so that a process ends without a warning."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
