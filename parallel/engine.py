"""What an engine is: float32 master weights, AdamW, and their division over replicas, as flat shares.

Gradients arrive already divided by the global count of targets times the number of replicas; the engine averages over the
replicas, so that the result is the sum over all targets / their count. A step whose gradient norm is not finite is not
applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamWOptions(NamedTuple):
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip_norm: float  # 0 leaves gradients as they are


class Step(NamedTuple):
    """What a step came to, on the device: whoever looks at it waits for the device."""

    grad_norm: Tensor  # (), before clipping; inf or nan where the step was not applied
    applied: Tensor  # (), bool


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

    @property
    def modules(self) -> Sequence[Any]:
        """What the schedule calls, in place of this rank's stages."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Around the backward passes of all micro-batches of a step but the last: gradients only accumulate. Outside,
        their reduction over the replicas may begin."""

    def step(self, learning_rate: float) -> Step:
        """Finish the accumulated gradients, clip, update, clear."""

    def shares(self) -> Iterator[Share]:
        """What this rank keeps; over the data-parallel ranks each parameter's elements appear at least once."""

    def publish(self) -> None:
        """Make the model's weights those of the masters, after these were written to."""

    @property
    def updates(self) -> int:
        """Applied steps, which AdamW's bias correction counts; read back from the device."""

    @updates.setter
    def updates(self, count: int) -> None: ...


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


def bound(optimizer: torch.optim.AdamW, norm: Tensor, clip_norm: float) -> Tensor:
    """Have the optimizer's next step clip by this gradient norm, or change nothing where that is not finite: masters,
    moments and step counters. Returns whether it is finite, (), bool. Reads nothing back.

    torch's fused step does both in its own pass, by two attributes that were made for loss scaling.
    """
    # Where DeepSpeed keeps the optimizer on the host. torch's own copy there would not be waited for.
    norm = norm.to(next(p.device for group in optimizer.param_groups for p in group["params"]))
    finite = norm.isfinite()
    optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
    if clip_norm > 0:  # gradients are divided by this
        optimizer.grad_scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0).to(torch.float32)  # type: ignore[attr-defined]
    return finite


def start_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor] | None = None) -> None:
    """Make the moments before the first step, so that loading can write into them."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in held if parameters is None else parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS},
        }


class Counted:
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
