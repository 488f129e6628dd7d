"""Layer norm (Ba et al. 2016) and root-mean-square norm (Zhang and Sennrich 2019) over the last dimension, and the residual
sum with its dropout before them.

Statistics are float32 whatever the tensor's type, and the result has the tensor's type. torch's own functions do exactly
this on a CPU and inductor fuses them; by hand in eager mode the same costs five times as much.

Backends: `torch`, which is the CPU's path, the reference, and left to torch.compile to fuse; `triton`
(`kernels.norm_triton`), in which sum, dropout and norm are one pass.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels import norm_triton
from kernels.available import Backend, must_run
from kernels.noise import dropout as drop


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias; x (..., H), weight and bias (H,)."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight; x (..., H), weight (H,)."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, *, layer: bool, backend: Backend = "torch"
) -> Tensor:
    """Layer norm or, without `layer`, root-mean-square norm, which has no bias; shapes as theirs.

    Raises ValueError for `triton` where it cannot run.
    """
    if backend == "torch":
        return layer_norm(x, weight, bias, epsilon) if layer else rms_norm(x, weight, epsilon)
    _must_run(x)
    found: tuple[Tensor, Tensor, Tensor] = norm_triton.normalise(
        x, None, weight, bias if layer else None, None, layer, epsilon, 0.0, 0, 0
    )
    return found[0]


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    *,
    layer: bool,
    dropout: float = 0.0,
    keys: Tensor | None = None,
    site: int = 0,
    first_row: int = 0,
    backend: Backend = "torch",
) -> tuple[Tensor, Tensor]:
    """(the norm of the sum, the sum) of residual and x after dropout: x and residual (B, S, H); dropout, its rate, keys (B,),
    site and first_row as in `kernels.noise.dropout`.

    Raises ValueError for dropout without keys, and for `triton` where it cannot run.
    """
    if dropout and keys is None:
        raise ValueError("dropout needs the sample keys of the batch: pass sample_keys, or call eval()")
    if backend == "torch":
        total = residual + (drop(x, dropout, keys, site, first_row) if keys is not None else x)
        return norm(total, weight, bias, epsilon, layer=layer), total
    _must_run(x)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x and residual must be alike, found {tuple(x.shape)} {x.dtype}, {tuple(residual.shape)} {residual.dtype}"
        )
    out, total, _ = norm_triton.normalise(
        x,
        residual,
        weight,
        bias if layer else None,
        keys if dropout else None,
        layer,
        epsilon,
        dropout,
        site,
        first_row,
    )
    return out, total


def _must_run(x: Tensor) -> None:
    must_run(x)
    if reason := norm_triton.unsupported_width(x.shape[-1], x.dtype):
        raise ValueError(f"triton cannot normalise this: {reason}. torch can")
