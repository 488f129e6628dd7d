"""The output layer's loss by Triton, in every type, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.available import Wish
from kernels.cross_entropy import linear_cross_entropy
from tests.gpu.conftest import Place

FROBENIUS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
VOCABULARY, PADDED, HIDDEN = 1000, 1024, 64


def gradients(
    backend: Wish, inputs: list[Tensor], rest: tuple[Tensor, Tensor], options: dict[str, Any]
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = linear_cross_entropy(*leaves, *rest, vocab_size=VOCABULARY, backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "smoothed"])
def test_loss_and_gradients(place: Place, options: dict[str, Any]) -> None:
    """Error at most twice that of torch in the same type, and 1e-5 of the largest; a Frobenius norm of the type."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator) for shape in ((2, place.length, HIDDEN), (PADDED, HIDDEN))]
    targets = torch.randint(VOCABULARY, (2, place.length), generator=generator).to(place.device)
    rest = (targets, (targets % 7 > 0).float())
    for dtype in place.dtypes:
        inputs = [x.to(place.device, dtype) for x in numbers]
        exact = gradients("torch", [x.double() for x in inputs], rest, options)
        plain = gradients("torch", inputs, rest, options)
        found = gradients("triton", inputs, rest, options)
        for i, (want, near, got) in enumerate(zip(exact, plain, found, strict=True)):
            floor = 1e-5 * want.abs().max()
            assert (got - want).abs().max() <= 2 * (near - want).abs().max() + floor, (dtype, i)
            assert (got - want).norm() <= FROBENIUS[dtype] * (2 if i else 1) * want.norm(), (dtype, i)
