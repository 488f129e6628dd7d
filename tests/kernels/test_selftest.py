"""The self-test of attention's backend: right ones pass, and each planted fault is found and named with its device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import backends, selftest
from kernels.attention import attention
from kernels.backends import Call
from tests.kernels.workers import interpret

CPU = torch.device("cpu")
PLAIN = Call(heads=4, groups=2, size=64, length=256, total=256)
EVERYTHING = PLAIN._replace(window=300, documents=True, biased=True, dropout=True, softcap=True)


def test_the_case_is_the_one_where_sums_of_exponentials_underflow() -> None:
    q, k, *_ = selftest._inputs(PLAIN, CPU, torch.float64, selftest.LENGTH)
    scores = torch.einsum("sd,td->st", q[0, :, 0], k[0, :, 0]) / 64**0.5
    assert scores.logsumexp(dim=1).max() < -88.7 and selftest.LENGTH % 128 == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_a_right_kernel_passes(dtype: torch.dtype, causal: bool) -> None:
    selftest.check("flash", PLAIN._replace(causal=causal), CPU, dtype)


@pytest.mark.parametrize("call", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_triton_passes_in_its_interpreter(call: Call, dtype: str) -> None:
    interpret(_check, call, dtype)


def _check(call: Call, dtype: str) -> None:
    selftest.check("triton", call, CPU, getattr(torch, dtype))


def _hooked(change: Callable[[Tensor], Tensor], which: int) -> Callable[..., Tensor]:
    """Attention whose gradient of q, k or v is another."""

    def changed(*tensors: Tensor, **options: object) -> Tensor:
        views = [x.view_as(x) for x in tensors]
        views[which].register_hook(change)
        return attention(*views, **options)  # type: ignore[arg-type]

    return changed


def _scaled(*tensors: Tensor, **options: object) -> Tensor:
    return attention(*tensors, **options) * 1.01  # type: ignore[arg-type]


def _one_element(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[0, -1, 0, 0] += gradient.abs().max()
    return gradient


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (_scaled, "output"),
        (_hooked(lambda grad: grad * torch.nan, 0), "dQ"),
        (_hooked(_one_element, 1), "dK"),
        (_hooked(torch.zeros_like, 2), "dV"),
    ],
)
def test_a_wrong_kernel_is_named_with_device_versions_and_shape(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Tensor], name: str
) -> None:
    monkeypatch.setitem(backends._FUNCTIONS, "flash", fault)
    with pytest.raises(selftest.Broken, match=rf"flash fails its self-test: {name} is off") as error:
        selftest.check("flash", PLAIN, CPU, torch.float32)
    for part in (f"torch {torch.__version__}", "(1, 64, 2, 64)", "torch.float32", "kernels.attention"):
        assert part in str(error.value)
