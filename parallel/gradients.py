"""Finishing gradients: the sums that a layout owes before the optimizer may step.

Who sums what, and where:
- norms and row biases under sequence parallelism: over the tensor ranks, here, all in one flat reduction a step, where
  their gradients have accumulated (at ZeRO 2 and 3 that is not `.grad`: `parallel.sharded`);
- the tied embedding under pipelines: over its first and last stage, here, before the engine's step;
- data-parallel replicas: `parallel.averaging` at stages 0 and 1 (bfloat16), elsewhere DeepSpeed;
- the global norm: every logical element once. Replicated parameters count on tensor rank 0, a tied copy not at all.

Sums over different axes commute, so it does not matter which is done first, as long as all ranks do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from kernels.adamw import square_sum


def main_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Where the gradient has accumulated: the float32 buffer of the engine, or `.grad`."""
    main = getattr(parameter, "_hp_grad", None)
    return main if main is not None else parameter.grad


def accumulated(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Their gradients, where they have accumulated."""
    gradients = [main_gradient(parameter) for parameter in parameters]
    assert all(gradient is not None for gradient in gradients), "a parameter took no part in the loss"
    return gradients  # type: ignore[return-value]


def is_sliced(parameter: nn.Parameter) -> bool:
    """Whether it is whole on every tensor rank, but its gradient there only a part of the sum."""
    return getattr(parameter, "sequence_parallel", False)


def sum_slices(parameters: Iterable[nn.Parameter], group: Any) -> None:
    """Add up the gradients of those that saw a slice each, over the tensor ranks."""
    sum_flat(accumulated(filter(is_sliced, parameters)), group)


def sum_flat(tensors: list[Tensor], group: Any) -> None:
    """Sum over the group's ranks, in place, in one reduction."""
    if not tensors:
        return
    flat = _flatten_dense_tensors(tensors)
    dist.all_reduce(flat, group=group)
    torch._foreach_copy_(tensors, list(_unflatten_dense_tensors(flat, tensors)))


def sum_slices_in_backward(parameters: Iterable[nn.Parameter], group: Any) -> None:
    """The same one by one, as the backward pass makes them: for engines that keep nothing to be summed later."""

    def total(gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=group)
        return gradient

    for parameter in filter(is_sliced, parameters):
        parameter.register_hook(total)


def sum_tied(parameter: nn.Parameter | None, group: Any) -> None:
    """Add up the gradient of an embedding that the first and the last stage both hold, if it learns."""
    if parameter is None or group is None or not parameter.requires_grad:
        return
    [gradient] = accumulated([parameter])
    dist.all_reduce(gradient, group=group)


def counts_once(parameter: nn.Parameter, tensor_rank: int) -> bool:
    """Whether this rank adds the parameter to a sum over all logical elements."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def global_norm(
    parameters: list[nn.Parameter],
    gradients: list[Tensor],
    tensor_rank: int,
    group: Any,
    total: Callable[[list[Tensor]], Tensor] = square_sum,
    device: torch.device | None = None,
) -> Tensor:
    """Euclidean norm of the whole model's gradient, the same on every rank.

    group: tensor x pipeline ranks, or None; total: the sum of the squares of some of the gradients, (), float64; device:
    where these are.
    """
    ours = [g for p, g in zip(parameters, gradients, strict=True) if counts_once(p, tensor_rank)]
    square = total(ours) if ours else torch.zeros((), dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(square, group=group)
    return square.sqrt()
