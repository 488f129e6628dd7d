"""The two Triton passes over a chunk's logits as operators that torch.compile sees as one step each: `kernels.cross_entropy`.

Triton is imported when a kernel is first launched, never with this module. On a CPU the kernels run in Triton's interpreter
alone (TRITON_INTERPRET=1 before the first import of triton), which is slow and is there to prove them. `launch` is called
once for each launch of a kernel, with its name.

Shapes: M rows of a chunk, V this rank's classes, of which the first `real` are no padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 4096  # classes at once: with 8 warps 16 a thread, two accesses of 128 bits in bfloat16
LANES = 16  # classes a thread


@torch.library.custom_op("kernels::softmax_statistics", mutates_args=())
def statistics(logits: Tensor, targets: Tensor, first_class: int, real: int, summed: bool) -> Tensor:
    """(4, M) float32 of logits (M, V), whose column i is class first_class + i, and targets (M,) ids: each row's maximum, the
    sum of exponentials of the distance from it, its target's logit (0 where that is another rank's), the sum of its logits
    (0 unless `summed`); the padding left out."""
    found = torch.empty(4, logits.shape[0], dtype=torch.float32, device=logits.device)
    launch("statistics_kernel", logits, (targets.contiguous(), found), real, first_class, SUMMED=summed)
    return found


@statistics.register_fake
def _(logits: Tensor, targets: Tensor, first_class: int, real: int, summed: bool) -> Tensor:
    return torch.empty(4, logits.shape[0], dtype=torch.float32, device=logits.device)


@torch.library.custom_op("kernels::cross_entropy_slope", mutates_args=("logits",))
def write_slope(
    logits: Tensor,
    statistics: Tensor,
    targets: Tensor,
    counts: Tensor,
    first_class: int,
    real: int,
    vocab_size: int,
    smoothing: float,
    z_loss: float,
) -> None:
    """Writes over logits (M, V) the slope of the loss by them, 0 for the padding, times counts (M,). statistics (4, M): of
    the whole vocabulary."""
    tensors = (targets.contiguous(), counts.float().contiguous(), statistics.contiguous())
    numbers = (1.0 - smoothing, smoothing / vocab_size, z_loss)
    launch("slope_kernel", logits, tensors, real, first_class, *numbers, SMOOTHED=smoothing > 0)


@write_slope.register_fake
def _(logits: Tensor, *_: Any) -> None:
    return None


def launch(
    name: str, logits: Tensor, tensors: tuple[Tensor, ...], real: int, first_class: int, *numbers: float, **flags: bool
) -> None:
    """A program for each row of logits (M, V), whose rows may lie apart, but not their classes."""
    from kernels.triton import cross_entropy as kernels  # here, so that importing this module needs no triton

    rows, width = logits.shape
    if logits.stride(1) != 1 and width > 1:
        raise ValueError(f"logits whose classes lie side by side are needed, found strides {logits.stride()}")
    if rows == 0:
        return
    block = min(BLOCK, 1 << (width - 1).bit_length())
    with torch.cuda.device_of(logits):  # Triton launches on the current device; on a CPU this does nothing
        getattr(kernels, name)[(rows,)](
            logits, *tensors, rows, logits.stride(0), width, real, first_class, *numbers, **flags,
            BLOCK=block, num_warps=max(1, block // (32 * LANES)), enable_fp_fusion=True,
        )  # fmt: skip
