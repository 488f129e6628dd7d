"""The norms' Triton kernels against float64, for the tests' interpreting process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kernels import norm_triton, rows
from kernels.noise import sample_keys
from kernels.norm import add_norm, norm
from tests.kernels.nearness import placed, planted, too_far, with_gradients


class Setting(NamedTuple):
    layer: bool = True
    batch: int = 2
    length: int = 5
    width: int = 37
    dtype: str = "float32"
    biased: bool = True
    added: bool = True
    dropout: float = 0.3  # where there is a residual
    layout: str = "plain"
    offset: float = 0.5  # of all numbers: of the mean, about
    used: str = "both"  # whose gradient comes: norm, both
    first_row: int = 3
    epsilon: float = 1e-5
    elements: int = 128  # of a tile
    strips: int = 2


def tensors(setting: Setting) -> tuple[list[Tensor], list[Tensor]]:
    """x, residual, weight, bias, as far as there are; gradients of the norm and the sum."""
    s = setting
    generator = torch.Generator().manual_seed(s.length * 1000 + s.width)
    shape = (s.batch, s.length, s.width)
    made = [torch.randn(size, generator=generator) for size in (shape, shape, shape, shape, s.width, s.width)]
    made = [placed(x.to(getattr(torch, s.dtype)), s.layout) for x in made]
    x, residual, *slopes, weight, bias = made
    inputs = [x + s.offset, *([residual] if s.added else []), weight + 0.5, *([bias] if s.layer and s.biased else [])]
    return [placed(y, s.layout) for y in inputs], slopes


@contextmanager
def cut(setting: Setting) -> Iterator[None]:
    with (
        mock.patch.object(norm_triton, "ELEMENTS", setting.elements),
        mock.patch.object(rows, "SUMS", 0),
        mock.patch.object(rows, "FEWEST_STRIPS", setting.strips),
    ):
        yield


def keys_of(setting: Setting) -> Tensor:
    return sample_keys(3, torch.arange(7, 7 + setting.batch))


def call(setting: Setting, backend: Any, keys: Tensor, *inputs: Tensor) -> Any:
    s = setting
    x, *rest = inputs
    weight, bias = rest[s.added], rest[s.added + 1] if len(rest) > s.added + 1 else None
    if not s.added:
        return norm(x, weight, bias, s.epsilon, layer=s.layer, backend=backend)
    options = {"dropout": s.dropout, "keys": keys, "site": 11, "first_row": s.first_row}
    both = add_norm(x, rest[0], weight, bias, s.epsilon, layer=s.layer, backend=backend, **options)  # type: ignore[arg-type]
    return both if s.used == "both" else both[0]


def results(setting: Setting, backend: Any, wide: bool = False, function: Any = call) -> list[Tensor]:
    """Norm, sum, and the gradients of all inputs; wide: in float64."""
    (inputs, slopes), keys = tensors(setting), keys_of(setting)
    if wide:
        inputs = [x.double() for x in inputs]
    slopes = slopes[: 2 if setting.added and setting.used == "both" else 1]
    with cut(setting):
        return with_gradients(lambda *given: function(setting, backend, keys, *given), inputs, slopes)


def wrong(setting: Setting) -> list[str]:
    exact, eager = results(setting, "torch", wide=True), results(setting, "torch")
    names = ["norm", *(["sum"] if setting.added and setting.used == "both" else [])]
    names += ["dx", *(["dresidual"] if setting.added else []), "dweight", "dbias"]
    return too_far(names[: len(exact)], results(setting, "triton"), eager, exact)


def all_wrong(settings: list[Setting]) -> dict[str, list[str]]:
    """Of many settings, those that are wrong."""
    found = {str(setting): wrong(setting) for setting in settings}
    return {setting: errors for setting, errors in found.items() if errors}


def wrong_with_fault(right: str, fault: str, settings: list[Setting]) -> list[list[str]]:
    with planted("norm", right, fault):
        return [wrong(setting) for setting in settings]


def masks(setting: Setting) -> tuple[Tensor, Tensor]:
    """What dropout keeps, forward and backward: True where the sum of ones and zeros, and ones' gradient, is not 0."""
    ones = torch.ones(setting.batch, setting.length, setting.width, requires_grad=True)
    weight, options = torch.ones(setting.width), {"keys": keys_of(setting), "site": 5, "first_row": setting.first_row}
    with cut(setting):
        _, total = add_norm(
            ones, torch.zeros_like(ones), weight, None, 1e-5, layer=False, dropout=setting.dropout, backend="triton",
            **options,  # type: ignore[arg-type]
        )  # fmt: skip
        (slope,) = torch.autograd.grad(total.sum(), ones)
    assert torch.equal(total.detach(), slope)
    return total.detach() != 0, total.detach()


def far_apart() -> bool:
    """Rows 2^30 elements apart, so that the third begins beyond 32 bits, give what close ones give."""
    step = 2**30 + 64
    x = torch.empty(2 * step + 20, dtype=torch.float16).as_strided((1, 3, 20), (3 * step, step, 1))
    x.copy_(torch.randn(1, 3, 20, generator=torch.Generator().manual_seed(1)))
    apart, close = (
        with_gradients(
            lambda x, w: norm(x, w, None, 1e-5, layer=True, backend="triton"),
            [y, torch.ones(20, dtype=x.dtype)],
            [torch.linspace(-1, 1, 60).view(1, 3, 20)],
        )
        for y in (x, x.clone())
    )
    return all(torch.equal(a, b) for a, b in zip(apart, close, strict=True))


def opcheck(setting: Setting) -> set[str]:
    """torch.library.opcheck: schema, fake tensors, the registered gradient, tracing by AOTAutograd."""
    inputs = [x.requires_grad_() for x in tensors(setting)[0]]
    arguments = (*inputs, keys_of(setting), True, 1e-5, 0.3, 5, 2)
    return set(torch.library.opcheck(torch.ops.kernels.norm.default, arguments).values())


def compiled(setting: Setting) -> tuple[bool, list[str]]:
    """Whether compiled code (one graph, or it raises) gives the same bits, and what it launched."""
    torch.compiler.reset()
    function = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    with mock.patch.object(norm_triton, "launch", wraps=norm_triton.launch) as launch:
        found = results(setting, "triton", function=function)
    same = all(torch.equal(a, b) for a, b in zip(found, results(setting, "triton"), strict=True))
    return same, [call.args[0] for call in launch.call_args_list]


def refusals() -> list[str]:
    """Rows that are too wide, and a residual of another type."""
    found = []
    for call in (
        lambda: norm(torch.ones(1, 8193).half(), torch.ones(8193), None, 1e-5, layer=True, backend="triton"),
        lambda: add_norm(
            torch.ones(1, 2, 4), torch.ones(1, 2, 4).half(), torch.ones(4), None, 1e-5, layer=True, backend="triton"
        ),
    ):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found
