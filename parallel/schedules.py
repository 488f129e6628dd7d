"""Running one step's micro-batches forward and backward through the stages.

One stage: a plain loop. Several: megatron-core's 1F1B and interleaved schedules. The loss is a sum over targets divided
by the global count of targets, so neither micro-batches nor ranks with fewer targets weigh more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from parallel.grid import Grid
from parallel.stages import Stage

MicroBatch = tuple[Tensor | None, ...]  # what the first stage takes; the first is (B, S)
NoSync = Callable[[], AbstractContextManager[None]]
Finish = Callable[[Tensor], tuple[Tensor, Tensor]]  # a last stage's output -> its scalar loss, and what is kept
Phase = Callable[[str], AbstractContextManager[None]]
TIMERS = {"forward-compute": "forward", "backward-compute": "backward"}  # of megatron-core -> our phases


class Schedule:
    """Drives the stages of one process.

    `hidden_size` and `dtype` are those of the activations that stages exchange; backward passes after which another one
    of the same step and stage follows are within `no_sync()` (`parallel.engine.Engine.no_sync`). Each forward and backward
    pass is within `phase("forward")` or `phase("backward")`, which does nothing unless a profile sets it.
    """

    def __init__(
        self, stages: Sequence[Any], grid: Grid, hidden_size: int, dtype: torch.dtype, no_sync: NoSync = nullcontext
    ) -> None:
        self.stages, self.grid, self.no_sync = stages, grid, no_sync
        self.phase: Phase = lambda name: nullcontext()
        if grid.layout.pipeline > 1:
            config = _schedule_config(grid, hidden_size, dtype)
            config.no_sync_func = no_sync
            config.timers = _Timers(self)
            for stage in stages:
                stage.config, stage.model_type = config, _model_type()

    def run(self, batches: Sequence[MicroBatch], scale: float | Tensor, forward_only: bool = False) -> Tensor:
        """Forward (and backward of the sum of loss * scale) over the micro-batches; gradients accumulate in the
        parameters. The last stage gives a loss () or the losses (k,) of several terms; scale: a number, or a tensor () or
        (k,) on the device.

        Returns the float32 sums of the losses over this rank's micro-batches, unscaled, of the same shape, on the ranks of
        the last stage; zero elsewhere. Reads nothing back from the device.
        """
        if self.grid.layout.pipeline == 1:
            return self._run_alone(batches, scale, forward_only)
        return self._run_pipeline(batches, scale, forward_only)

    def outputs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """What the last stage gives for each of the micro-batches, without gradient, on its ranks; elsewhere nothing."""
        if self.grid.layout.pipeline == 1:
            with torch.no_grad():
                return [self.stages[0](batch) for batch in batches]
        return self._through_pipeline(batches, lambda output: (output.sum(), output.detach().clone()), True)

    def _run_alone(self, batches: Sequence[MicroBatch], scale: float | Tensor, forward_only: bool) -> Tensor:
        total = torch.zeros((), device=self.grid.device)
        for number, batch in enumerate(batches, 1):
            with self.phase("forward"), torch.set_grad_enabled(not forward_only):
                loss = self.stages[0](batch)
            if not forward_only:
                with self.phase("backward"), nullcontext() if number == len(batches) else self.no_sync():
                    (loss * scale).sum().backward()
            total = total + loss.detach()
        return total

    def _run_pipeline(self, batches: Sequence[MicroBatch], scale: float | Tensor, forward_only: bool) -> Tensor:
        # The schedule divides the returned loss by the number of micro-batches and multiplies it by the context ranks.
        scale = scale * len(batches) / self.grid.layout.context
        losses = self._through_pipeline(batches, lambda loss: _scaled(loss, scale), forward_only)
        return torch.stack(losses).sum(dim=0) if losses else torch.zeros((), device=self.grid.device)

    def _through_pipeline(self, batches: Sequence[MicroBatch], finish: Finish, forward_only: bool) -> list[Tensor]:
        """The second of what `finish` makes of each of the last stage's outputs, on its ranks; of the first are the
        gradients."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(source: Iterator[MicroBatch], stage: Stage) -> tuple[Tensor, Any]:
            return stage(next(source)), finish

        layout = self.grid.layout
        sources = [iter(batches) for _ in self.stages]
        several = len(self.stages) > 1
        slices = layout.context * (layout.tensor if layout.sequence else 1)
        inputs = batches[0][0]
        assert inputs is not None
        B, S = inputs.shape
        found: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=sources if several else sources[0],
            model=self.stages if several else self.stages[0],
            num_microbatches=len(batches),
            # These two only size the buffers for hidden states: (seq_length / slices, micro_batch_size, H). Ours are
            # (B, S / slices, H), so the two are given the other way round.
            seq_length=B * slices,
            micro_batch_size=S // slices,
            forward_only=forward_only,
        )
        return found


def _scaled(loss: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """What the gradients are of, and a copy of the losses to log, since the schedule divides the first in place."""
    return (loss * scale).sum(), loss.detach().clone()


class _Timers:
    """What megatron-core's schedules start and stop around their passes, as phases of `schedule`."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.name = ""
        self.open: dict[str, AbstractContextManager[None]] = {}

    def __call__(self, name: str, log_level: int = 0) -> _Timers:
        self.name = name
        return self

    def start(self, barrier: bool = False) -> None:
        if phase := TIMERS.get(self.name):
            self.open[phase] = self.schedule.phase(phase)
            self.open[phase].__enter__()

    def stop(self, barrier: bool = False) -> None:
        if phase := TIMERS.get(self.name):
            self.open.pop(phase).__exit__(None, None, None)


def _schedule_config(grid: Grid, hidden_size: int, dtype: torch.dtype) -> Any:
    from megatron.core import ModelParallelConfig

    layout = grid.layout
    interleaved = layout.virtual > 1
    config = ModelParallelConfig(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if interleaved else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
        pipeline_dtype=dtype,
        # Two interleaved stages exchange with the same neighbour in both directions: batched operations would pair up
        # wrongly there (silently wrong gradients on gloo), overlapped single ones do not.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,
    )
    # What the schedules read beyond this class (they expect the larger TransformerConfig).
    for name, value in {
        "hidden_size": hidden_size,
        "calculate_per_token_loss": False,
        "fine_grained_activation_offloading": False,
        "overlap_moe_expert_parallel_comm": False,
    }.items():
        setattr(config, name, value)
    return config


def _model_type() -> Any:
    from megatron.core.enums import ModelType

    return ModelType.encoder_or_decoder
