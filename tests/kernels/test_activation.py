"""Activations against their formulas, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.activation import ACTIVATIONS, GATED, activate, activation


def normal_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": normal_gelu,
    "gelu-tanh": tanh_gelu,
    "relu": lambda x: x * (x > 0),
    "swiglu": lambda x: x[..., :6] * torch.sigmoid(x[..., :6]) * x[..., 6:],
    "geglu": lambda x: normal_gelu(x[..., :6]) * x[..., 6:],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_its_formula(name: str) -> None:
    x = torch.linspace(-6, 6, 4 * 12, dtype=torch.float64).view(4, 12).requires_grad_()
    found, expected = activation(name)(x), FORMULAS[name](x)
    assert found.shape == ((4, 6) if name in GATED else (4, 12))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ours, wanted = (torch.autograd.grad(out.sin().sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_bias_is_added_before(name: str) -> None:
    x = torch.linspace(-3, 3.1, 4 * 12, dtype=torch.float64).view(4, 12).requires_grad_()
    bias = torch.linspace(-1, 1, 12, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(activate(name, x, bias), FORMULAS[name](x + bias), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, bias: activate(name, x, bias), (x, bias))


def test_an_unknown_name_is_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'silu': expected one of gelu, gelu-tanh, relu, swiglu, geglu"):
        activation("silu")
