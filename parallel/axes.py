"""A process's place among the ranks that share layers or sequences, what passes between the tensor ranks at the edges of
the parallel layers, and the marks by which the engine knows a share from a copy.

Shapes: B batch, S this context rank's sequence (s = S / tensor under sequence parallelism).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class TensorAxis:
    """This process's place among the ranks that share each layer."""

    size: int = 1
    rank: int = 0
    group: Any = None
    sequence: bool = False  # activations between the parallel layers are cut along the sequence


@dataclass(frozen=True)
class ContextAxis:
    """This process's place among the ranks that share each sequence: rank r has the r-th of `size` equal slices."""

    size: int = 1
    rank: int = 0
    group: Any = None


# -- at the edges of the tensor-parallel region: megatron-core's collectives, along our sequence dimension -----------


def enter(x: Tensor, axis: TensorAxis) -> Tensor:
    """Before a column-parallel product: gather the sequence, or copy with an all-reduce of the gradient."""
    if axis.size == 1:
        return x
    from megatron.core.tensor_parallel import mappings

    if not axis.sequence:
        return mappings.copy_to_tensor_model_parallel_region(x, group=axis.group)
    gathered = mappings.gather_from_sequence_parallel_region(x.transpose(0, 1).contiguous(), group=axis.group)
    return gathered.transpose(0, 1)


def leave(x: Tensor, axis: TensorAxis) -> Tensor:
    """After a row-parallel product: sum over the tensor ranks, keeping only this rank's slice of a cut sequence."""
    if axis.size == 1:
        return x
    from megatron.core.tensor_parallel import mappings

    if not axis.sequence:
        return mappings.reduce_from_tensor_model_parallel_region(x, group=axis.group)
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(x.transpose(0, 1).contiguous(), group=axis.group)
    return scattered.transpose(0, 1)


# -- marks ---------------------------------------------------------------------------------------------------------


def mark_cut(parameter: Any, axis: TensorAxis, dim: int) -> Any:
    """Mark a share of a logical tensor, so that norms count it once for each rank (megatron-core's and DeepSpeed's flag)."""
    if parameter is not None and axis.size > 1:
        parameter.tensor_model_parallel = True
        parameter.partition_dim = dim
        parameter.partition_stride = 1
    return parameter


def mark_summed(parameter: nn.Parameter, axis: TensorAxis) -> nn.Parameter:
    """Mark a replicated parameter that sees only this rank's slice of the sequence."""
    return mark_partial(parameter, axis) if axis.sequence else parameter


def mark_partial(parameter: nn.Parameter, axis: TensorAxis) -> nn.Parameter:
    """Mark a replicated parameter whose gradient on each tensor rank is a part of the sum: the engine sums the gradients of
    all such over the group (`parallel.gradients.sum_slices`)."""
    if axis.size > 1:
        parameter.sequence_parallel = True  # type: ignore[attr-defined]  # megatron-core's flag
    return parameter
