"""Finishing gradients: the sums that a layout owes before the optimizer may step.

Who sums what, and where:
- norms and row biases under sequence parallelism: over the tensor ranks, in a tensor hook (`parallel.layers`);
- the tied embedding under pipelines: over its first and last stage, here, before the engine's step;
- data-parallel replicas: the engine (DeepSpeed at ZeRO >= 1, `average` at stage 0);
- the global norm: every logical element once. Replicated parameters count on tensor rank 0, a tied copy not at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

NORM_PART = 2**16  # elements: torch's float32 norm of three million on a CPU is wrong in the fifth digit
BUCKET = 2**25  # elements a flat reduction: large enough to fill a link, small enough to bound the copy


def main_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Where the gradient has accumulated: the float32 buffer of the engine, or `.grad`."""
    main = getattr(parameter, "_hp_grad", None)
    return main if main is not None else parameter.grad


def sum_tied(parameter: nn.Parameter | None, group: Any) -> None:
    """Add up the gradient of an embedding that the first and the last stage both hold."""
    if parameter is None or group is None:
        return
    gradient = main_gradient(parameter)
    assert gradient is not None, "the tied embedding has had no backward pass"
    dist.all_reduce(gradient, group=group)


def average(gradients: list[Tensor], group: Any) -> None:
    """Mean over the data-parallel replicas, in place, in flat buckets."""
    size = dist.get_world_size(group)
    if size == 1:
        return
    for bucket in _buckets(gradients):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat, group=group)
        flat /= size
        for gradient, whole in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(whole)


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.numel() > BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.numel()
    if bucket:
        yield bucket


def counts_once(parameter: nn.Parameter, tensor_rank: int) -> bool:
    """Whether this rank adds the parameter to a sum over all logical elements."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)


def global_norm(parameters: list[nn.Parameter], gradients: list[Tensor], tensor_rank: int, group: Any) -> Tensor:
    """Euclidean norm of the whole model's gradient, the same on every rank; group: tensor x pipeline ranks, or None."""
    ours = [g for p, g in zip(parameters, gradients, strict=True) if counts_once(p, tensor_rank)]
    parts = [part for gradient in ours for part in gradient.reshape(-1).split(NORM_PART)]
    square = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    if parts:
        square = torch.stack(list(torch._foreach_norm(parts))).double().square().sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    return square.sqrt()
