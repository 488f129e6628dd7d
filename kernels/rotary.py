"""Rotary position embedding (Su et al. 2021, "RoFormer"): pairs of a head's features turn by position * frequency.

Feature i turns with feature i + D/2 (the half-split order of GPT-NeoX and Llama), at frequency base^(-2i/D). Scaling
stretches a model to longer sequences than it was trained on:

    linear  every frequency / factor                                    (Chen et al. 2023, "Position interpolation")
    ntk     base * factor^(D / (D - 2)): the slowest / factor, the fastest kept    (NTK-aware, "bloc97" 2023)
    llama3  slow ones / factor, fast ones kept, a ramp between them      (Llama 3.1)

Backends of `rotary_pair`: `torch`, which is the CPU's path, the reference, and left to torch.compile to fuse; `triton`
(`kernels.rotary_triton`), which turns queries and keys in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import rotary_triton
from kernels.available import Backend, must_run

SCALINGS = ("linear", "ntk", "llama3")


def rotary_angles(
    positions: Tensor, head_size: int, base: float = 10000.0, scaling: Mapping[str, object] | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (S, D/2), of positions (S,). scaling: None or {"kind": ..., "factor": ..., and for llama3
    "low_frequency_factor", "high_frequency_factor", "original_positions"}; ValueError for another kind."""
    angles = positions.to(torch.float32)[:, None] * frequencies(head_size, base, scaling).to(positions.device)[None, :]
    return angles.cos(), angles.sin()


def frequencies(head_size: int, base: float, scaling: Mapping[str, object] | None = None) -> Tensor:
    """(D/2,) float32 radians a position."""
    if head_size % 2:
        raise ValueError(f"rotary positions need an even head size, found {head_size}")
    kind = None if scaling is None else scaling.get("kind")
    if kind is not None and kind not in SCALINGS:
        raise ValueError(f"unknown rotary scaling {kind!r}: expected one of {', '.join(SCALINGS)}")
    factor = 1.0 if scaling is None else float(scaling.get("factor", 1.0))  # type: ignore[arg-type]
    if kind == "ntk":
        if head_size == 2:
            raise ValueError(
                "rotary scaling ntk needs a head size of more than 2: a single frequency has no slowest one"
            )
        base = base * factor ** (head_size / (head_size - 2))
    values = 1.0 / base ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    if kind == "linear":
        return values / factor
    if kind == "llama3":
        assert scaling is not None
        return _llama3(values, factor, scaling)
    return values


def _llama3(values: Tensor, factor: float, scaling: Mapping[str, object]) -> Tensor:
    low = float(scaling.get("low_frequency_factor", 1.0))  # type: ignore[arg-type]
    high = float(scaling.get("high_frequency_factor", 4.0))  # type: ignore[arg-type]
    original = float(scaling.get("original_positions", 8192))  # type: ignore[arg-type]
    if high <= low:
        raise ValueError(f"llama3 needs high_frequency_factor above low_frequency_factor, found {high} and {low}")
    turns = original * values / (2 * math.pi)  # that a feature makes over the sequence it was trained on
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return values * (kept + (1.0 - kept) / factor)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, S, N, D) turned by cos, sin (S, D/2) or (B, S, D/2); computed in float32, given back in x's type."""
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]  # over the heads
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_pair(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, backend: Backend = "torch"
) -> tuple[Tensor, Tensor]:
    """q (B, S, N, D) and k (B, S, G, D) turned. cos and sin (P, D/2) float32, P = S; or, with positions (B, S) int, each
    token by the row that it names, which must be one of the P (Triton does not look).

    Raises ValueError for shapes that do not fit, and for `triton` where it cannot run.
    """
    batch, length, _, size = q.shape
    if 2 * cos.shape[-1] != size or cos.shape != sin.shape:
        raise ValueError(f"heads of {size} need cos and sin of {size // 2}, found {cos.shape[-1]} and {sin.shape[-1]}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != size:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in more than their heads")
    if positions is None and len(cos) != length:
        raise ValueError(f"{length} places need as many rows of angles, found {len(cos)}: pass positions")
    if positions is not None and positions.shape != (batch, length):
        raise ValueError(f"positions of ({batch}, {length}) are needed, found {tuple(positions.shape)}")
    if backend == "triton":
        must_run(q)
        return rotary_triton.turn(q, k, cos, sin, positions, False)  # type: ignore[no-any-return]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    return rotary(q, cos, sin), rotary(k, cos, sin)
