"""The rotary positions' Triton kernel against float64, for the tests' interpreting process."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from kernels import rotary_triton
from kernels.rotary import rotary_angles, rotary_pair
from tests.kernels.nearness import planted, too_far, with_gradients

NAMES = ("q", "k", "dq", "dk")


class Setting(NamedTuple):
    batch: int = 2
    length: int = 9
    heads: int = 5
    groups: int = 2
    size: int = 12
    dtype: str = "float32"
    placed: bool = False  # by positions that begin anew in each document
    layout: str = "packed"  # of q and k: packed in one tensor, plain, transposed
    elements: int = 16  # of a tile


def tensors(setting: Setting) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """q and k; the outputs' gradients; cos, sin and positions or None."""
    s = setting
    generator = torch.Generator().manual_seed(s.length * 100 + s.size)
    shape, dtype = (s.batch, s.length, s.heads + 2 * s.groups, s.size), getattr(torch, s.dtype)
    both = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    (q, k, _), grads = (x.split((s.heads, s.groups, s.groups), dim=2) for x in both)
    if s.layout == "plain":
        q, k = q.contiguous(), k.contiguous()
    if s.layout == "transposed":
        q, k = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k))
    cos, sin = rotary_angles(torch.arange(3, 3 + s.length), s.size, 100.0)
    places = torch.arange(s.length)
    positions = torch.stack([places % (2 + row) for row in range(s.batch)]) if s.placed and s.batch else None
    return [q, k], list(grads[:2]), [cos, sin, positions]


def results(setting: Setting, backend: Any, wide: bool = False, call: Any = rotary_pair) -> list[Tensor]:
    """Both outputs and both gradients; wide: in float64, by the same float32 angles."""
    inputs, grads, rest = tensors(setting)
    inputs = [x.double() for x in inputs] if wide else inputs
    with mock.patch.object(rotary_triton, "ELEMENTS", setting.elements):
        return with_gradients(lambda q, k: call(q, k, *rest, backend=backend), inputs, grads)


def wrong(setting: Setting) -> list[str]:
    exact, eager = results(setting, "torch", wide=True), results(setting, "torch")
    return too_far(NAMES, results(setting, "triton"), eager, exact)


def all_wrong(settings: list[Setting]) -> dict[str, list[str]]:
    """Of many settings, those that are wrong."""
    found = {str(setting): wrong(setting) for setting in settings}
    return {setting: errors for setting, errors in found.items() if errors}


def wrong_with_fault(right: str, fault: str, settings: list[Setting]) -> list[list[str]]:
    with planted("rotary", right, fault):
        return [wrong(setting) for setting in settings]


def far_apart() -> bool:
    """Tokens 2^30 elements apart, so that the third begins beyond 32 bits, give what close ones give."""
    step = 2**30 + 64
    q = torch.empty(2 * step + 32, dtype=torch.float16).as_strided((1, 3, 2, 16), (3 * step, step, 16, 1))
    q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(1)))
    angles = rotary_angles(torch.arange(3), 16)
    apart, close = (rotary_pair(x, x[:, :, :1], *angles, backend="triton") for x in (q, q.clone()))
    return all(torch.equal(a, b) for a, b in zip(apart, close, strict=True))


def opcheck(setting: Setting) -> set[str]:
    """torch.library.opcheck: schema, fake tensors, the registered gradient, tracing by AOTAutograd."""
    (q, k), _, rest = tensors(setting)
    arguments = (q.requires_grad_(), k.requires_grad_(), *rest, False)
    return set(torch.library.opcheck(torch.ops.kernels.rotary.default, arguments).values())


def compiled(setting: Setting) -> tuple[bool, list[str]]:
    """Whether compiled code (one graph, or it raises) gives the same bits, and what it launched."""
    torch.compiler.reset()
    call = torch.compile(rotary_pair, fullgraph=True, dynamic=False, backend="aot_eager")
    with mock.patch.object(rotary_triton, "launch", wraps=rotary_triton.launch) as launch:
        found = results(setting, "triton", call=call)
    same = all(torch.equal(a, b) for a, b in zip(found, results(setting, "triton"), strict=True))
    return same, [call.args[0] for call in launch.call_args_list]
