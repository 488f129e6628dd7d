"""The rule that the row kernels are held to, and copies of their files with a fault: for the tests' interpreting process.

Rule: error <= twice that of torch's own operations in the same type + 1e-5, and a relative error within the type's bound.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kernels.triton
from tests.distributed import REPOSITORY

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative Frobenius; gradients twice that
LAYOUTS = ("plain", "odd", "apart", "transposed")


def placed(x: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere in memory: at an odd address, in rows with gaps, or features apart."""
    if layout == "odd":
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    if layout == "apart":
        return torch.full((*x.shape[:-1], x.shape[-1] + 5), 7.0, dtype=x.dtype)[..., : x.shape[-1]].copy_(x)
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def with_gradients(call: Callable[..., Any], inputs: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of call(*inputs), and what each input's gradient is where the outputs' are `slopes`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = call(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gradients = torch.autograd.grad(outputs, leaves, [s.to(o.dtype) for s, o in zip(slopes, outputs, strict=True)])
    return [*(output.detach() for output in outputs), *gradients]


def too_far(names: Sequence[str], found: list[Tensor], eager: list[Tensor], exact: list[Tensor]) -> list[str]:
    """What breaks the rule; a name of a gradient begins with d."""
    wrong = []
    for name, mine, theirs, truth in zip(names, found, eager, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == truth.shape, f"{name}: {mine.dtype} {tuple(mine.shape)}"
        if not truth.numel():
            continue
        error, allowed = ((result.double() - truth).abs().max().item() for result in (mine, theirs))
        if not error <= 2 * allowed + 1e-5:
            wrong.append(f"{name}: error {error:.2e}, eager {allowed:.2e}")
        bound = BOUNDS[mine.dtype] * (2 if name.startswith("d") else 1)
        if not (mine.double() - truth).norm() <= bound * truth.norm() + 1e-12:
            wrong.append(f"{name}: relative error {((mine.double() - truth).norm() / truth.norm()).item():.2e}")
    return wrong


@contextmanager
def planted(module: str, right: str, fault: str) -> Iterator[None]:
    """Within it kernels/triton/`module`.py is a copy in which `fault` stands for `right`, which must stand there once."""
    source = (REPOSITORY / f"kernels/triton/{module}.py").read_text()
    assert source.count(right) == 1, f"{module} has {right!r} {source.count(right)} times"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "faulty.py"
        path.write_text(source.replace(right, fault))
        spec = importlib.util.spec_from_file_location("faulty", path)
        assert spec is not None and spec.loader is not None
        faulty = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(faulty)
        with mock.patch.object(kernels.triton, module, faulty, create=True):
            yield
