"""Every backend of attention that this device has, in every type, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import attention
from kernels.backends import BACKENDS, Backend, Call, attend, refusal
from kernels.noise import sample_keys
from tests.gpu.conftest import Place

FROBENIUS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 33},
    "documents": {"documents": True},
    "dropout": {"dropout": 0.1},
    "slopes": {"slopes": True},
    "everything": {"window": 33, "documents": True, "dropout": 0.1, "slopes": True, "softcap": 20.0},
}


def options_of(feature: str, length: int, heads: int, device: torch.device) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": True, **FEATURES[feature]}
    if options.get("documents"):
        places = torch.arange(length, device=device)
        options["documents"] = torch.stack((places // (length // 3 + 1), places // 7)).to(torch.int32)
    if options.get("slopes"):
        options["slopes"] = torch.linspace(0.01, 0.5, heads, device=device)
    if options.get("dropout"):
        options |= {"keys": sample_keys(3, torch.arange(2)).to(device), "site": 5}
    return options


def gradients(backend: Backend, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attention(*leaves, **options) if backend == "torch" else attend(backend, *leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("size", "groups"), [(64, 4), (128, 1), (80, 2)])
def test_output_and_gradients(place: Place, backend: Backend, feature: str, size: int, groups: int) -> None:
    """Error at most twice that of torch in the same type, and 1e-5; a Frobenius norm (gradients: twice) of the type."""
    device, length = place.device, place.length
    options = options_of(feature, length, 4, device)
    call = Call(
        *(4, groups, size, length, length, options["causal"], options.get("window"), "documents" in options),
        biased="slopes" in options,
        dropout="dropout" in options,
        softcap="softcap" in options,
    )
    generator = torch.Generator().manual_seed(size)
    shapes = [(2, length, 4, size), (2, length, groups, size), (2, length, groups, size), (2, length, 4, size)]
    numbers = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    for dtype in place.dtypes:
        if refusal(backend, call, device, dtype):
            continue
        inputs = [x.to(dtype) for x in numbers]
        exact = gradients("torch", [x.double() for x in inputs], options)
        plain = gradients("torch", inputs, options)
        found = gradients(backend, inputs, options)
        for i, (want, near, got) in enumerate(zip(exact, plain, found, strict=True)):
            assert (got - want).abs().max() <= 2 * (near - want).abs().max() + 1e-5, (
                dtype,
                ["out", "dQ", "dK", "dV"][i],
            )
            assert (got - want).norm() <= FROBENIUS[dtype] * (2 if i else 1) * want.norm(), (dtype, i)


def test_twice_the_same_inputs_give_twice_the_same_bits(place: Place) -> None:
    options = options_of("everything", place.length, 4, place.device)
    inputs = [torch.randn(2, place.length, 4, 64, device=place.device, dtype=place.dtypes[0]) for _ in range(4)]
    first, second = (gradients("triton", inputs, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
