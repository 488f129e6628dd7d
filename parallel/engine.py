"""What an engine is: float32 master weights, AdamW, and their division over replicas, as flat shares.

A weight that does not learn (its `requires_grad` is False) is none of the optimizer's: it has neither master nor moments and
is what the model computes with, in the model's type.

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

from kernels.adamw import MOMENTS as MOMENTS
from kernels.adamw import AdamW
from kernels.available import Wish


class AdamWOptions(NamedTuple):
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    clip_norm: float  # 0 leaves gradients as they are
    backend: Wish = "auto"  # of AdamW
    apart: bool = False  # what the model computes with are copies of the masters, in float32 too


class Step(NamedTuple):
    """What a step came to, on the device: whoever looks at it waits for the device."""

    grad_norm: Tensor  # (), before clipping; inf or nan where the step was not applied
    applied: Tensor  # (), bool


@dataclass(frozen=True)
class Share:
    """Elements `start : start + numel` of a flattened local parameter, whose optimizer state this rank keeps.

    `master` and `moments` are flat views (numel,) float32 into the optimizer's own memory: writing to them is loading. Of a
    weight that does not learn `master` is the model's own, in its type, and there are no moments. `replicated`: every
    replica keeps the same.
    """

    path: str
    parameter: nn.Parameter
    start: int
    numel: int
    master: Tensor
    moments: dict[str, Tensor]
    replicated: bool = False


class Engine(Protocol):
    replicated: bool  # every replica keeps all that learns, and all of its optimizer
    optimizer: AdamW  # that the masters are given to, whole or in shares

    @property
    def modules(self) -> Sequence[Any]:
        """What the schedule calls, in place of this rank's stages."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Around the backward passes of all micro-batches of a step but the last: gradients only accumulate. Outside,
        their reduction over the replicas may begin."""

    def step(self, learning_rate: float) -> Step:
        """Finish the accumulated gradients, clip, update, clear."""

    def leave_out(self) -> None:
        """The next step finishes and clears the gradients, but changes nothing."""

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


def adamw(parameters: Iterable[nn.Parameter], options: AdamWOptions) -> AdamW:
    """The optimizer of every engine, which DeepSpeed is given too; no decay on norms and biases. A parameter's `rate`, 1
    unless it has one, multiplies the learning rate."""
    by_kind: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        kind = not parameter.decay, getattr(parameter, "rate", 1.0)  # type: ignore[attr-defined]
        by_kind.setdefault(kind, []).append(parameter)
    groups = [
        {"params": group, "weight_decay": 0.0 if plain else options.weight_decay, "rate": rate}
        for (plain, rate), group in sorted(by_kind.items(), key=lambda item: item[0])
    ]
    return AdamW(
        groups or [{"params": [], "rate": 1.0}],
        lr=0.0,
        betas=options.betas,
        eps=options.epsilon,
        backend=options.backend,
    )


def parted(paths: dict[nn.Parameter, str]) -> tuple[dict[nn.Parameter, str], dict[nn.Parameter, str]]:
    """Those that learn, and those that do not."""
    learning = {parameter: path for parameter, path in paths.items() if parameter.requires_grad}
    return learning, {parameter: path for parameter, path in paths.items() if parameter not in learning}


def frozen_shares(frozen: dict[nn.Parameter, str]) -> Iterator[Share]:
    """Of weights that do not learn, where every replica has them whole."""
    for parameter, path in frozen.items():
        yield Share(path, parameter, 0, parameter.numel(), parameter.data.view(-1), {}, replicated=True)


class Counted:
    """What an engine takes from its optimizer."""

    optimizer: AdamW

    @property
    def updates(self) -> int:
        return self.optimizer.updates

    @updates.setter
    def updates(self, count: int) -> None:
        self.optimizer.updates = count

    def leave_out(self) -> None:
        self.optimizer.leaves_out = True

    def _set_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
