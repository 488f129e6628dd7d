"""The engine: float32 master weights, AdamW, and their division over data-parallel ranks (ZeRO).

`PlainEngine` is stage 0: every data-parallel rank holds all of the optimizer. `DeepSpeedEngine` is stage 1 (Rajbhandari et
al. 2020, "ZeRO"): each holds a flat share. Both present the optimizer as `Share`s, flat intervals of local parameters, so
that initial weights, checkpoints and exports need not know which engine runs.

Gradients arrive already divided by the global count of targets times the data-parallel size; the engine averages over the
data-parallel ranks, so that the result is the sum over all targets / their count. A step whose gradient norm is not finite
is not applied.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.gradients import average, global_norm, sum_tied
from parallel.grid import Grid
from parallel.stages import Stage, parameter_paths

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWOptions(NamedTuple):
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip_norm: float  # 0 leaves gradients as they are


class Step(NamedTuple):
    grad_norm: float  # before clipping; inf or nan where the step was not applied
    applied: bool


@dataclass(frozen=True)
class Share:
    """Elements `start : start + numel` of a flattened local parameter, whose optimizer state this rank keeps.

    `master` and `moments` are flat views (numel,) float32 into the optimizer's own memory: writing to them is loading.
    """

    path: str
    parameter: nn.Parameter
    start: int
    numel: int
    master: Tensor
    moments: dict[str, Tensor]


class Engine(Protocol):
    replicated: bool  # every data-parallel rank keeps all of the optimizer

    def step(self, learning_rate: float) -> Step:
        """Finish the accumulated gradients, clip, update, clear."""

    def shares(self) -> Iterator[Share]:
        """What this rank keeps; over the data-parallel ranks each parameter's elements appear at least once."""

    def publish(self) -> None:
        """Make the model's weights those of the masters, after these were written to."""

    @property
    def updates(self) -> int:
        """Applied steps, which AdamW's bias correction counts."""

    @updates.setter
    def updates(self, count: int) -> None: ...


def make_engine(stages: list[Stage], grid: Grid, options: AdamWOptions, tied: nn.Parameter | None) -> Engine:
    """stages: this rank's, their parameters in the compute dtype. tied: its end of an embedding that is also at the
    other end of the pipeline, else None."""
    if tied is not None and not grid.first_stage:
        tied.ds_pipe_replicated = True  # type: ignore[attr-defined]  # norms and checkpoints take the first stage's alone
    if grid.layout.zero == 0:
        return PlainEngine(stages, grid, options, tied)
    return DeepSpeedEngine(stages, grid, options, tied)


def set_weights(engine: Engine, values: Callable[[str, nn.Parameter], Tensor]) -> None:
    """Write master weights from whole local parameters: `values(path, parameter)` gives float32 of its shape."""
    made: tuple[str, Tensor] | None = None
    with torch.no_grad():
        for share in engine.shares():
            if made is None or made[0] != share.path:
                made = (share.path, values(share.path, share.parameter).flatten())
            share.master.copy_(made[1][share.start : share.start + share.numel])
    engine.publish()


def adamw(parameters: Iterable[nn.Parameter], options: AdamWOptions) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); no decay on norms and biases."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if parameter.decay else plain).append(parameter)  # type: ignore[attr-defined]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, options.weight_decay), (plain, 0.0))
        if group
    ]
    # fused is 6 to 7 times faster than foreach on a CPU, and one launch on a GPU.
    return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.epsilon, fused=True)


def _start_state(optimizer: torch.optim.AdamW) -> None:
    """Make the moments before the first step, so that loading can write into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS},
            }


class _Counted:
    """AdamW's step counter, which torch keeps once a parameter."""

    optimizer: torch.optim.AdamW

    @property
    def updates(self) -> int:
        return int(next(iter(self.optimizer.state.values()))["step"].item())

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(count)

    def _set_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate


class PlainEngine(_Counted):
    """ZeRO stage 0: gradients averaged in flat buckets, the whole optimizer on every data-parallel rank.

    With a bfloat16 model the masters are float32 copies, and gradients accumulate into float32 as each micro-batch's
    backward produces them (bfloat16 accumulation loses the small ones).
    """

    replicated = True

    def __init__(self, stages: list[Stage], grid: Grid, options: AdamWOptions, tied: nn.Parameter | None) -> None:
        self.grid, self.options, self.tied = grid, options, tied
        self.names = parameter_paths(stages)
        self.optimizer = adamw(self.names, options)
        self.parameters: list[nn.Parameter] = []
        self.masters: list[nn.Parameter] = []
        for group in self.optimizer.param_groups:
            masters = [p if p.dtype == torch.float32 else _master(p) for p in group["params"]]
            self.parameters += group["params"]
            self.masters += masters
            group["params"] = masters
        _start_state(self.optimizer)

    def step(self, learning_rate: float) -> Step:
        sum_tied(self.tied, self.grid.embedding_group)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad, parameter._hp_grad = parameter._hp_grad, None  # type: ignore[attr-defined]
        gradients = [master.grad for master in self.masters if master.grad is not None]
        assert len(gradients) == len(self.masters), "a parameter took no part in the loss"
        if self.grid.data_size > 1:
            average(gradients, self.grid.data_group)
        norm = global_norm(self.parameters, gradients, self.grid.tensor.rank, self.grid.model_group)
        value = norm.item()
        applied = math.isfinite(value)
        if applied:
            self._update(gradients, norm, learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        return Step(value, applied)

    def _update(self, gradients: list[Tensor], norm: Tensor, learning_rate: float) -> None:
        if self.options.clip_norm > 0:
            # torch.nn.utils.clip_grad_norm_'s factor
            torch._foreach_mul_(gradients, (self.options.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self._set_rate(learning_rate)
        self.optimizer.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        changed = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        if changed:
            torch._foreach_copy_([p.data for p, _ in changed], [m.data for _, m in changed])

    def shares(self) -> Iterator[Share]:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            state = self.optimizer.state[master]
            moments = {name: state[name].view(-1) for name in MOMENTS}
            yield Share(self.names[parameter], parameter, 0, parameter.numel(), master.data.view(-1), moments)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    master = nn.Parameter(parameter.detach().float())

    def accumulate(p: nn.Parameter) -> None:
        assert p.grad is not None
        held = getattr(p, "_hp_grad", None)
        if held is None:
            p._hp_grad = p.grad.float()  # type: ignore[attr-defined]
        else:
            held.add_(p.grad)
        p.grad = None

    parameter.register_post_accumulate_grad_hook(accumulate)
    return master


class DeepSpeedEngine(_Counted):
    """ZeRO stage 1 by DeepSpeed, driven from outside: our schedule runs the raw modules, `step` reduces and updates."""

    replicated = False

    def __init__(self, stages: list[Stage], grid: Grid, options: AdamWOptions, tied: nn.Parameter | None) -> None:
        deepspeed = _import_deepspeed(grid.device)
        self.grid, self.tied = grid, tied
        self.names = parameter_paths(stages)
        bf16 = next(iter(self.names)).dtype == torch.bfloat16
        self.optimizer = adamw(self.names, options)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory at every step of the way
            self.engine, *_ = deepspeed.initialize(
                model=nn.ModuleList(stages),
                optimizer=self.optimizer,
                config=_deepspeed_config(grid.layout.zero, options.clip_norm, bf16),
                mpu=_Groups(grid),
                dist_init_required=False,
            )
        _start_state(self.optimizer)
        self._shares = list(self._find_shares())

    def step(self, learning_rate: float) -> Step:
        sum_tied(self.tied, self.grid.embedding_group)
        self._set_rate(learning_rate)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return Step(float(norm), not self.engine.optimizer.overflow)

    def publish(self) -> None:
        self.engine.optimizer.update_lp_params()

    def shares(self) -> Iterator[Share]:
        return iter(self._shares)

    def _find_shares(self) -> Iterator[Share]:
        """DeepSpeed's fragment map: where each parameter's elements lie in this rank's flat partitions."""
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


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed with its logging quiet and, on a CPU, without the operator that it would compile at first use."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher; DeepSpeed refuses to start where it is missing
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    return deepspeed


def _deepspeed_config(stage: int, clip_norm: float, bf16: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own counters use it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "managed_gradient_accumulation": False,  # backward only accumulates; `step` is the boundary
        "steps_per_print": None,
    }
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
        self._data = grid.data_group or dist.group.WORLD
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
