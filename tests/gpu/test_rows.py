"""Norms, rotary positions and activations by Triton, in every type, against float64; and twice the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.activation import ACTIVATIONS, GATED, activate
from kernels.noise import sample_keys
from kernels.norm import add_norm, norm
from kernels.rotary import rotary_angles, rotary_pair
from tests.gpu.conftest import Place
from tests.kernels.nearness import too_far, with_gradients

Call = tuple[
    list[str], list[tuple[int, ...]], int, Callable[..., Any]
]  # names, shapes of inputs, outputs, the function


def the_norm(place: Place, kind: str, width: int) -> Call:
    layer, shape = "layer" in kind, (2, place.length, width)
    if "sum" not in kind:
        names, shapes = ["norm", "dx", "dweight", "dbias"], [shape, (width,), (width,)]
        return (
            names[: 3 + layer],
            shapes[: 2 + layer],
            1,
            lambda x, w, *b, backend: norm(x, w, b[0] if b else None, 1e-5, layer=layer, backend=backend),
        )
    options: dict[str, Any] = {"dropout": 0.1, "keys": sample_keys(3, torch.arange(2)).to(place.device), "site": 5}

    def call(x: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor, backend: Any) -> Any:
        return add_norm(
            x, residual, weight, bias[0] if bias else None, 1e-5, layer=layer, backend=backend, first_row=3, **options
        )

    names, shapes = ["norm", "sum", "dx", "dresidual", "dweight", "dbias"], [shape, shape, (width,), (width,)]
    return names[: 5 + layer], shapes[: 3 + layer], 2, call


def the_rotation(place: Place, kind: str, width: int) -> Call:
    angles = [x.to(place.device) for x in rotary_angles(torch.arange(place.length), width)]
    places = torch.arange(place.length, device=place.device)
    positions = torch.stack((places % 7, places // 2)) if "documents" in kind else None
    shapes = [(2, place.length, heads, width) for heads in (6, 2)]
    return ["q", "k", "dq", "dk"], shapes, 2, lambda q, k, backend: rotary_pair(q, k, *angles, positions, backend)


def the_activation(place: Place, kind: str, width: int) -> Call:
    inputs = width * (2 if kind in GATED else 1)
    shapes = [(2, place.length, inputs), (inputs,)]
    return ["out", "dx", "dbias"], shapes, 1, lambda x, bias, backend: activate(kind, x, bias, backend)


CASES = [
    *((the_norm, kind, width) for kind in ("layer", "rms", "layer sum", "rms sum") for width in (100, 1024)),
    *((the_rotation, kind, width) for kind in ("whole", "documents") for width in (64, 80, 128)),
    *((the_activation, kind, 1000) for kind in ACTIVATIONS),
]


@pytest.mark.parametrize(("make", "kind", "width"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_outputs_and_gradients(place: Place, make: Callable[..., Call], kind: str, width: int) -> None:
    """Error at most twice that of torch in the same type, and 1e-5; a Frobenius norm (gradients: twice) of the type."""
    names, shapes, outputs, call = make(place, kind, width)
    generator = torch.Generator().manual_seed(width)
    numbers = [torch.randn(shape, generator=generator).to(place.device) for shape in shapes]
    for dtype in place.dtypes:
        inputs = [x.to(dtype) for x in numbers]
        with torch.no_grad():
            made = call(*inputs, backend="torch")
        made = [made] if outputs == 1 else made
        slopes = [torch.randn(y.shape, generator=generator).to(place.device, dtype) for y in made]
        exact = with_gradients(lambda *x: call(*x, backend="torch"), [x.double() for x in inputs], slopes)
        eager = with_gradients(lambda *x: call(*x, backend="torch"), inputs, slopes)
        found, again = (with_gradients(lambda *x: call(*x, backend="triton"), inputs, slopes) for _ in range(2))
        assert too_far(names, found, eager, exact) == [], dtype
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), (
            "twice the same, not twice the same bits"
        )
