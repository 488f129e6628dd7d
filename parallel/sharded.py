"""ZeRO stages 1 to 3 by DeepSpeed (Rajbhandari et al. 2020): the optimizer, then gradients, then weights in shares."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import library
from parallel.engine import MOMENTS, AdamWOptions, Counted, Share, Step, adamw, start_state
from parallel.gradients import BUCKET, sum_tied
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
        self.grid, self.tied, self.stage = grid, tied, layout.zero
        self.names = parameter_paths(stages)
        bf16 = next(iter(self.names)).dtype == torch.bfloat16
        self.optimizer = adamw(self.names, options)
        inside = layout.zero > 1
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every step of the way
            self.engine, *_ = library.deepspeed().initialize(
                model=stages[0] if inside else nn.ModuleList(stages),
                optimizer=self.optimizer,
                config=_deepspeed_config(layout, options.clip_norm, bf16, sum(p.numel() for p in self.names)),
                mpu=_Groups(grid),
                dist_init_required=False,
            )
        self.modules: Sequence[Any] = [self.engine] if inside else stages
        self.zero = self.engine.optimizer
        start_state(self.optimizer, self.zero.fp32_partitioned_groups_flat if self.stage == 3 else None)
        self._shares = list(self._find_whole_shares() if self.stage == 3 else self._find_shares())

    def step(self, learning_rate: float) -> Step:
        sum_tied(self.tied, self.grid.embedding_group)
        self._set_rate(learning_rate)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return Step(float(norm), not self.zero.overflow)

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


def _deepspeed_config(layout: Layout, clip_norm: float, bf16: bool, numel: int) -> dict[str, Any]:
    """numel: of this rank's parameters."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own counters use it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        # It allocates this many elements whatever the model has; its default of 5e8 are 2 GB in float32.
        "zero_optimization": {"stage": layout.zero, "reduce_bucket_size": min(BUCKET, numel)},
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
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
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
