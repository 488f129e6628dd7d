"""AdamW by Triton over a hundred steps against float64, with bfloat16 copies and gradients."""

from __future__ import annotations

import pytest
import torch

from kernels.adamw import AdamW
from tests.gpu.conftest import Place

SHAPES = [(7,), (64, 48), (1025,), (3, 5, 7)]


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
def test_a_hundred_steps(place: Place, gradients: torch.dtype) -> None:
    if place.rehearsed and gradients == torch.bfloat16:
        gradients = torch.float16  # what the interpreter can
    steps = 10 if place.rehearsed else 100
    generator = torch.Generator().manual_seed(0)
    begin = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours = [torch.nn.Parameter(x.to(place.device)) for x in begin]
    exact = [torch.nn.Parameter(x.double()) for x in begin]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}
    optimizer, reference = AdamW(ours, backend="triton", **options), torch.optim.AdamW(exact, **options)  # type: ignore[arg-type]
    optimizer.start_state()
    optimizer.copies = {p: torch.empty_like(p, dtype=gradients) for p in ours}
    for _ in range(steps):
        for p, q in zip(ours, exact, strict=True):
            grad = torch.randn(p.shape, generator=generator).to(gradients)
            p.grad, q.grad = grad.to(place.device, torch.float32), grad.double()
        norm = torch.nn.utils.clip_grad_norm_(exact, 1.0)
        found = optimizer.square_sum([p.grad for p in ours if p.grad is not None]).sqrt()
        torch.testing.assert_close(found.cpu().double(), norm.double(), rtol=1e-6, atol=0)
        optimizer.bound(found, 1.0)
        optimizer.step()
        reference.step()
    for p, q in zip(ours, exact, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(optimizer.copies[p], p.detach().to(gradients))
