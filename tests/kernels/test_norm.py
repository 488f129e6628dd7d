"""Layer and root-mean-square norm against their formulas in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.norm import layer_norm, rms_norm


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((2, 5, 24), (24,), (24,))
    x, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    x, weight, bias = ((tensor + 0.5).to(dtype).requires_grad_() for tensor in (x, weight, bias))
    return x, weight, bias


def layer_formula(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight
    return out if bias is None else out + bias


def rms_formula(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    slope = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    gradients = (torch.autograd.grad(out, inputs, slope, retain_graph=True) for out in (found, expected))
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_is_its_formula(epsilon: float, biased: bool) -> None:
    x, weight, bias = tensors()
    inputs = [x, weight, bias] if biased else [x, weight]
    shift = bias if biased else None
    assert_same(layer_norm(x, weight, shift, epsilon), layer_formula(x, weight, shift, epsilon), inputs)


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_rms_norm_is_its_formula(epsilon: float) -> None:
    x, weight, _ = tensors()
    assert_same(rms_norm(x, weight, epsilon), rms_formula(x, weight, epsilon), [x, weight])


def test_statistics_of_bfloat16_are_float32() -> None:
    """Far from zero, where bfloat16 statistics would be wrong altogether; one rounding of the result is left."""
    x, weight, bias = (tensor.detach() for tensor in tensors(torch.bfloat16))
    x = x + 20
    wide = [tensor.double() for tensor in (x, weight, bias)]
    pairs = [
        (layer_norm(x, weight, bias, 1e-5), layer_formula(*wide, 1e-5)),
        (rms_norm(x, weight, 1e-5), rms_formula(*wide[:2], 1e-5)),
    ]
    for found, expected in pairs:
        assert found.dtype == torch.bfloat16
        assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-3).all()
