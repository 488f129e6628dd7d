"""The activations' Triton kernels against float64, for the tests' interpreting process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kernels import activation_triton, rows
from kernels.activation import GATED, activate
from tests.kernels.nearness import placed, planted, too_far, with_gradients


class Setting(NamedTuple):
    name: str = "gelu"
    shape: tuple[int, ...] = (2, 11)  # of the rows
    features: int = 37
    dtype: str = "float32"
    biased: bool = True
    layout: str = "plain"
    magnitude: float = 2.0
    columns: int = 16  # of a tile
    elements: int = 64
    strips: int = 3


def tensors(setting: Setting) -> list[Tensor]:
    """The output's gradient, x and the bias, if there is one."""
    s = setting
    width = s.features * (2 if s.name in GATED else 1)
    generator = torch.Generator().manual_seed(s.features)
    shapes = [(*s.shape, s.features), (*s.shape, width), *([(width,)] if s.biased else [])]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[1] *= s.magnitude
    return [placed(x.to(getattr(torch, s.dtype)), s.layout) for x in made]


@contextmanager
def cut(setting: Setting) -> Iterator[None]:
    with (
        mock.patch.object(activation_triton, "COLUMNS", setting.columns),
        mock.patch.object(activation_triton, "ELEMENTS", setting.elements),
        mock.patch.object(rows, "SUMS", 0),
        mock.patch.object(rows, "FEWEST_STRIPS", setting.strips),
    ):
        yield


def results(setting: Setting, backend: Any, wide: bool = False, call: Any = activate) -> list[Tensor]:
    """Output and gradients of x and bias; wide: in float64."""
    grad, *inputs = (x.double() if wide else x for x in tensors(setting))
    with cut(setting):
        return with_gradients(lambda *given: call(setting.name, *given, backend=backend), inputs, [grad])


def wrong(setting: Setting) -> list[str]:
    exact, eager = results(setting, "torch", wide=True), results(setting, "torch")
    return too_far(("out", "dx", "dbias")[: len(exact)], results(setting, "triton"), eager, exact)


def all_wrong(settings: list[Setting]) -> dict[str, list[str]]:
    """Of many settings, those that are wrong."""
    found = {str(setting): wrong(setting) for setting in settings}
    return {setting: errors for setting, errors in found.items() if errors}


def wrong_with_fault(right: str, fault: str, settings: list[Setting]) -> list[list[str]]:
    with planted("activation", right, fault):
        return [wrong(setting) for setting in settings]


def of(name: str, numbers: list[float]) -> list[list[float]]:
    """Output and gradient at some numbers, up and grad 1, by Triton and by torch."""
    x = torch.tensor(numbers)
    x = torch.cat((x, torch.ones_like(x))) if name in GATED else x
    run = lambda backend: with_gradients(lambda x: activate(name, x, backend=backend), [x], [torch.ones(len(numbers))])  # noqa: E731
    return [part[: len(numbers)].tolist() for backend in ("triton", "torch") for part in run(backend)]


def far_apart() -> bool:
    """Rows 2^30 elements apart, so that the third begins beyond 32 bits, give what close ones give."""
    step = 2**30 + 64
    x = torch.empty(2 * step + 20, dtype=torch.float16).as_strided((3, 20), (step, 1))
    x.copy_(torch.randn(3, 20, generator=torch.Generator().manual_seed(1)))
    apart, close = (
        with_gradients(lambda x: activate("swiglu", x, backend="triton"), [y], [torch.ones(3, 10)])
        for y in (x, x.clone())
    )
    return all(torch.equal(a, b) for a, b in zip(apart, close, strict=True))


def opcheck(setting: Setting) -> set[str]:
    """torch.library.opcheck: schema, fake tensors, the registered gradient, tracing by AOTAutograd."""
    _, x, bias = (y.requires_grad_() for y in tensors(setting))
    arguments = (x, bias, "silu", True)
    return set(torch.library.opcheck(torch.ops.kernels.activation.default, arguments).values())


def compiled(setting: Setting) -> tuple[bool, list[str]]:
    """Whether compiled code (one graph, or it raises) gives the same bits, and what it launched."""
    torch.compiler.reset()
    call = torch.compile(activate, fullgraph=True, dynamic=False, backend="aot_eager")
    with mock.patch.object(activation_triton, "launch", wraps=activation_triton.launch) as launch:
        found = results(setting, "triton", call=call)
    expected = results(setting, "triton")
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return same, [call.args[0] for call in launch.call_args_list]


def empty(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    setting = Setting("swiglu", shape[:-1], shape[-1])
    return [tuple(part.shape) for part in results(setting, "triton")]
