"""ZeRO stage 0: the whole optimizer on every replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from parallel.averaging import Averaging, buckets_of
from parallel.engine import MOMENTS, AdamWOptions, Counted, Share, Step, adamw, frozen_shares, parted
from parallel.gradients import global_norm, sum_slices, sum_tied
from parallel.grid import Grid
from parallel.stages import Stage, parameter_paths


class PlainEngine(Counted):
    """ZeRO stage 0: gradients averaged in flat buckets during the last backward pass, the whole optimizer on every
    data-parallel rank.

    With a bfloat16 model the masters are float32 copies, and gradients accumulate into float32 as each micro-batch's
    backward produces them (bfloat16 accumulation loses the small ones).
    """

    replicated = True

    def __init__(self, stages: list[Stage], grid: Grid, options: AdamWOptions, tied: nn.Parameter | None) -> None:
        self.grid, self.options, self.tied = grid, options, tied
        self.modules: Sequence[Any] = stages
        self.names, self.frozen = parted(parameter_paths(stages))
        self.optimizer = adamw(self.names, options)
        self.parameters: list[nn.Parameter] = []
        self.masters: list[nn.Parameter] = []
        for group in self.optimizer.param_groups:
            masters = [p if p.dtype == torch.float32 and not options.apart else _master(p) for p in group["params"]]
            self.parameters += group["params"]
            self.masters += masters
            group["params"] = masters
        self.optimizer.start_state()
        pairs = zip(self.masters, self.parameters, strict=True)
        self.optimizer.copies = {master: p for master, p in pairs if p is not master}
        # From the last layer to the first, as the backward pass goes.
        self.averaging = Averaging(list(buckets_of(reversed(self.names))), grid.replica_group)

    def no_sync(self) -> AbstractContextManager[None]:
        return self.averaging

    def step(self, learning_rate: float) -> Step:
        self.averaging.finish()
        sum_slices(self.names, self.grid.tensor.group)
        sum_tied(self.tied, self.grid.embedding_group)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad, parameter._hp_grad = parameter._hp_grad, None  # type: ignore[attr-defined]
        gradients = [master.grad for master in self.masters if master.grad is not None]
        assert len(gradients) == len(self.masters), "a parameter took no part in the loss"
        rank, group = self.grid.tensor.rank, self.grid.model_group
        norm = global_norm(self.parameters, gradients, rank, group, self.optimizer.square_sum, self.grid.device)
        applied = self.optimizer.bound(norm, self.options.clip_norm)
        self._set_rate(learning_rate)
        self.optimizer.step()
        if self.options.apart:
            self.publish()  # what a skipped step of the Triton kernel leaves as it is
        self.optimizer.zero_grad(set_to_none=True)
        return Step(norm, applied)

    @torch.no_grad()
    def publish(self) -> None:
        if self.optimizer.copies:
            torch._foreach_copy_([*self.optimizer.copies.values()], [*self.optimizer.copies])

    def shares(self) -> Iterator[Share]:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            state = self.optimizer.state[master]
            moments = {name: state[name].view(-1) for name in MOMENTS}
            flat = master.data.view(-1)
            yield Share(self.names[parameter], parameter, 0, parameter.numel(), flat, moments, replicated=True)
        yield from frozen_shares(self.frozen)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    master = nn.Parameter(parameter.detach().to(torch.float32, copy=True))

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
