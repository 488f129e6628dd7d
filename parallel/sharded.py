"""ZeRO stages 1 to 3 by DeepSpeed (Rajbhandari et al. 2020): the optimizer, then gradients, then weights in shares."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import library
from parallel.averaging import BUCKET, Averaging, Bucket, buckets_of
from parallel.engine import MOMENTS, AdamWOptions, Counted, Share, Step, adamw, frozen_shares, parted
from parallel.gradients import accumulated, is_sliced, sum_flat, sum_slices, sum_slices_in_backward, sum_tied
from parallel.grid import Grid
from parallel.layout import Layout
from parallel.stages import Stage, parameter_paths


class DeepSpeedEngine(Counted):
    """ZeRO by DeepSpeed, driven from outside: our schedule runs forward and backward, `step` reduces and updates.

    At stage 1 the schedule runs the raw stages, as megatron-core's must. Stages 2 and 3 reduce during the backward pass,
    for which DeepSpeed arms its hooks when it is itself called: there it takes the place of the one stage.
    """

    replicated = False

    def __init__(self, stages: list[Stage], grid: Grid, options: AdamWOptions, tied: nn.Parameter | None) -> None:
        layout = grid.layout
        self.grid, self.options, self.tied, self.stage = grid, options, tied, layout.zero
        self.names, self.frozen = parted(parameter_paths(stages))
        bf16 = next(iter(self.names)).dtype == torch.bfloat16
        self.optimizer = adamw(self.names, options)
        inside = layout.zero > 1
        if layout.offload:  # DeepSpeed takes the norm of each gradient while it copies it to the host
            sum_slices_in_backward(self.names, grid.tensor.group)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every step of the way
            self.engine, *_ = library.deepspeed().initialize(
                model=stages[0] if inside else nn.ModuleList(stages),
                optimizer=self.optimizer,
                config=_deepspeed_config(layout, bf16, sum(p.numel() for p in self.names)),
                mpu=_Groups(grid),
                dist_init_required=False,
            )
        self.modules: Sequence[Any] = [self.engine] if inside else stages
        self.zero = self.engine.optimizer
        self._last: Step | None = None
        self.optimizer.register_step_pre_hook(lambda *_: self._bound())
        if inside and not layout.offload:
            self._sum_slices_of_shares()
        self.averaging = self._average_ourselves() if bf16 and not inside else None
        self.optimizer.start_state(self.zero.fp32_partitioned_groups_flat if self.stage == 3 else None)
        self._shares = list(self._find_whole_shares() if self.stage == 3 else self._find_shares())

    def no_sync(self) -> AbstractContextManager[None]:
        return self.averaging or contextlib.nullcontext()

    def step(self, learning_rate: float) -> Step:
        if self.averaging:
            self.averaging.finish()
        if self.stage == 1:
            sum_slices(self.names, self.grid.tensor.group)
        sum_tied(self.tied, self.grid.embedding_group)
        self._set_rate(learning_rate)
        self._last = None
        self.engine.step()
        assert self._last is not None, "DeepSpeed did not step our optimizer"
        return self._last

    def _bound(self) -> None:
        """As DeepSpeed is about to step our optimizer, once for each of its groups: the norm is known by the first."""
        if self._last is not None:
            return
        norm = self.zero._global_grad_norm
        norm = norm.where(norm >= 0, torch.inf)  # what is not finite is -1 at stage 1
        self._last = Step(norm, self.optimizer.bound(norm, self.options.clip_norm))

    def _average_ourselves(self) -> Averaging:
        """Stage 1 in bfloat16: DeepSpeed would reduce in `step` alone. Its float32 gradients lie one after the other in
        a flat tensor for each of the optimizer's groups, so buckets are pieces of these and nothing is copied.

        In float32 stage 1 stays as it is: DeepSpeed 0.19.8 reduces and cuts into shares in one function there, and
        refuses `overlap_comm` where it does not count the micro-batches itself. The wait is all exposed: 38 of a step's
        346 ms with two replicas of 3.7M parameters over gloo, where stage 0 waits for 10 of 297.
        """
        self.engine.enable_backward_allreduce = False  # as its own pipeline engine does
        buckets = [bucket for group in self.zero.bf16_groups for bucket in buckets_of(reversed(group))]
        return Averaging(buckets, self.grid.replica_group, _joined)

    def _sum_slices_of_shares(self) -> None:
        """Stages 2 and 3 move gradients out of `.grad` during the backward pass, into this rank's share of their mean
        over the replicas. The tensor ranks hold like shares; they are summed when DeepSpeed has put the last in place."""
        finalize = self.zero.finalize_gradient_accumulation_boundary

        def finalize_and_sum() -> None:
            finalize()
            sum_flat(list(self._sliced_gradients()), self.grid.tensor.group)

        self.zero.finalize_gradient_accumulation_boundary = finalize_and_sum

    def _sliced_gradients(self) -> Iterator[Tensor]:
        for number, parameters in enumerate(
            self.zero.fp16_groups if self.stage == 3 else self.zero.params_in_partition
        ):
            held = (part for part in self.zero.averaged_gradients[number] if not getattr(part, "_zero_padding", False))
            yield from (part for parameter, part in zip(parameters, held, strict=False) if is_sliced(parameter))

    def publish(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for number in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:  # small ones, which every rank keeps whole
            self.zero.persistent_parameters[0].partition(self.zero.persistent_parameters)
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def shares(self) -> Iterator[Share]:
        return iter(self._shares)

    def _find_shares(self) -> Iterator[Share]:
        """Stages 1 and 2, by DeepSpeed's fragment map: where parameters' elements lie in this rank's flat partitions."""
        for parameter, path in self.names.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # all of it is another rank's
                continue
            master = mapping.get_hp_fragment()
            flat, start = self._partition_of(master)
            moments = {name: self.optimizer.state[flat][name].narrow(0, start, master.numel()) for name in MOMENTS}
            place = mapping.lp_fragment_address
            yield Share(path, parameter, place.start, place.numel, master, moments)
        yield from frozen_shares(self.frozen)

    def _partition_of(self, fragment: Tensor) -> tuple[nn.Parameter, int]:
        """The flat partition that a fragment is a view of, and where it begins in it."""
        for group in self.optimizer.param_groups:
            for flat in group["params"]:
                if flat.untyped_storage().data_ptr() == fragment.untyped_storage().data_ptr():
                    return flat, fragment.storage_offset() - flat.storage_offset()
        raise AssertionError("a DeepSpeed fragment lies in no partition of the optimizer")

    def _find_whole_shares(self) -> Iterator[Share]:
        """Stage 3: each parameter is cut into equal parts, the last padded."""
        for parameter, path in self.names.items():
            group, offset, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.grid.replica_rank * count
            real = min(count, math.prod(parameter.local_shape) - start)  # type: ignore[attr-defined]
            if real <= 0:
                continue
            flat = self.zero.fp32_partitioned_groups_flat[group]
            moments = {name: self.optimizer.state[flat][name].narrow(0, offset, real) for name in MOMENTS}
            yield Share(path, parameter, start, real, flat.data.narrow(0, offset, real), moments)
        for parameter, path in self.frozen.items():
            held = parameter.ds_tensor  # type: ignore[attr-defined]
            start = self.grid.replica_rank * held.ds_numel
            real = min(held.ds_numel, math.prod(parameter.local_shape) - start)  # type: ignore[attr-defined]
            if real > 0:
                yield Share(path, parameter, start, real, held.data.narrow(0, 0, real), {})


def _joined(bucket: Bucket) -> Tensor:
    """The flat piece that the float32 gradients of neighbours lie in, the bucket's last first."""
    [*_, first] = accumulated(bucket)
    return first.as_strided((sum(parameter.numel() for parameter in bucket),), (1,))


def _deepspeed_config(layout: Layout, bf16: bool, numel: int) -> dict[str, Any]:
    """numel: of this rank's parameters that learn."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own counters use it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # our optimizer clips; DeepSpeed's clipping reads the norm back
        "timers": {"throughput": {"enabled": False}},  # which waits for the device at every step
        # Stage 2 reduces a bucket of gradients while the next is made, on a GPU's second stream (on a CPU, which has no
        # streams, each reduction is waited for). Stage 3 does so by default, stage 1 may not. No value is read back for
        # it, but DeepSpeed 0.19.8 waits as each backward pass ends: at stage 2 for the device
        # (`overlapping_partition_gradients_reduce_epilogue`), at stage 3 for its second stream.
        "zero_optimization": {
            "stage": layout.zero,
            "overlap_comm": layout.zero > 1,
            # It allocates this many elements whatever the model has; its default of 5e8 are 2 GB in float32.
            "reduce_bucket_size": min(BUCKET, numel),
        },
        "zero_allow_untested_optimizer": True,
        "managed_gradient_accumulation": False,  # backward only accumulates; `step` is the boundary
        "steps_per_print": None,
    }
    if layout.offload:  # with our AdamW, not the one that DeepSpeed compiles
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    if bf16:
        # All away from the defaults: bfloat16 accumulation, with pipelines gradients that `step` never sees, and the
        # float32 sums rounded to bfloat16 again for their reduction over the data-parallel ranks (even if there is one).
        config["bf16"] = {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": False}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


class _Groups:
    """The grid as DeepSpeed's `mpu`. It must not have `initialize_sequence_parallel`, which turns model parallelism off."""

    def __init__(self, grid: Grid) -> None:
        self._data = grid.replica_group or dist.group.WORLD
        # One process alone is its own model-parallel group.
        self._model = grid.model_group or dist.group.WORLD
        self._tensor = grid.tensor.group or dist.group.WORLD

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._model)

    def get_tensor_model_parallel_group(self) -> Any:
        return self._tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)
