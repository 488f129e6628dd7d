"""The activations of a feed-forward layer, by name. Gated ones (Shazeer 2020, "GLU variants improve Transformer") take the
fused product (..., 2 F), its first half the gate: activation(gate) * up.

Backends of `activate`, which adds the bias before it: `torch`, which is the CPU's path, the reference, and left to
torch.compile to fuse; `triton` (`kernels.activation_triton`), in which the bias' gradient is part of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from kernels import activation_triton
from kernels.available import Backend, must_run


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
CURVES = {"swiglu": "silu", "geglu": "gelu"}  # what is taken of the gate; of the others, which are their own


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; ValueError lists the names there are."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activate(name: str, x: Tensor, bias: Tensor | None = None, backend: Backend = "torch") -> Tensor:
    """activation(x + bias): x (..., W), bias (W,), W = 2 F if gated -> (..., F).

    Raises ValueError for an unknown name, a bias of another size, and for `triton` where it cannot run.
    """
    function = activation(name)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"a bias of {x.shape[-1]} is needed, found {tuple(bias.shape)}")
    if backend == "torch":
        return function(x if bias is None else x + bias)
    must_run(x)
    return activation_triton.activate(x, bias, CURVES.get(name, name), name in GATED)
