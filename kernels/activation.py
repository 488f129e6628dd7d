"""The activations of a feed-forward layer, by name. Gated ones (Shazeer 2020, "GLU variants improve Transformer") take the
fused product (..., 2 F), its first half the gate: activation(gate) * up. Left to torch.compile to fuse."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's tanh form (Hendrycks and Gimpel 2016), which GPT-2 and GPT-3 use."""
    return F.gelu(x, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up; x (..., 2 F) = [gate | up] -> (..., F)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(x: Tensor) -> Tensor:
    """gelu(gate) * up; x (..., 2 F) = [gate | up] -> (..., F)."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": gelu_tanh,
    "relu": F.relu,
    "swiglu": swiglu,
    "geglu": geglu,
}
GATED = frozenset({"swiglu", "geglu"})


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; ValueError lists the names there are."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
