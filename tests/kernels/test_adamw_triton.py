"""AdamW's Triton kernels in the interpreter, and planted faults in them.

The interpreter widens bfloat16 exactly (tested), but cuts it off where a GPU rounds, so bfloat16 is only read there; that the
compiled kernel rounds is in test_adamw_compiled.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.distributed import die_with_parent
from tests.kernels import adamw_cases
from tests.kernels.adamw_cases import CHECKS, Case, Subject, distance, gradients_of


@pytest.fixture(scope="module")
def interpret() -> Iterator[Callable[..., Any]]:
    """`interpret(function, *args)` in a process whose Triton interprets; Triton decides that when it is imported."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=die_with_parent)
        pool.submit(torch.set_num_threads, 1).result(120)
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result(240)


def failing(fault: str | None) -> list[str]:
    """The names of the checks that fail on the interpreted kernels, of which one line is wrong."""
    if fault is None:
        return [name for name in CHECKS if fails(name)]
    module, right, wrong = FAULTS[fault]
    original = importlib.import_module(f"kernels.{module}")
    source = Path(str(original.__file__)).read_text()
    assert source.count(right) == 1, right
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{module}.py"
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location(f"kernels.{module}", path)
        assert spec is not None and spec.loader is not None
        faulty = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(faulty)
        with (
            mock.patch.dict(sys.modules, {f"kernels.{module}": faulty}),
            mock.patch("kernels." + module, faulty),
            mock.patch.dict(vars(adamw_cases), {"AdamW": faulty.AdamW} if module == "adamw" else {}),
        ):
            return [name for name in CHECKS if fails(name)]


def fails(name: str) -> bool:
    try:
        CHECKS[name]("triton")
    except AssertionError:
        return True
    return False


FAULTS = {
    "no bias correction": ("adamw_triton", "rate = lr / tl.load(corrections)", "rate = lr"),
    "decay in the gradient": (
        "adamw_triton",
        "    w = w * shrink - rate",
        "    g += (1.0 - shrink) * w\n    m += rest1 * (1.0 - shrink) * w\n    w = w - rate",
    ),
    "a stale clip factor": (
        "adamw",
        "self._restart(Bound(divisor,",
        "self._restart(Bound(divisor if self._bound is None else self._bound.divisor,",
    ),
    "one element beyond a block": (
        "adamw_triton",
        "        mask = offsets < numel\n        aligned",
        "        mask = offsets <= numel\n        aligned",
    ),
    "one element beyond a block of the norm": (
        "adamw_triton",
        "    mask = offsets < numel\n    total",
        "    mask = offsets <= numel\n    total",
    ),
    "a step that is not skipped": ("adamw_triton", "if tl.load(skipped) == 0.0:", "if tl.load(skipped) <= 1.0:"),
    "a copy of the old weight": (
        "adamw_triton",
        "_store(copy, COPY, offsets, mask, w, WHOLE)",
        "_store(copy, COPY, offsets, mask, w + rate, WHOLE)",
    ),
}
CAUGHT_BY = {  # and by no other check
    "no bias correction": {"formulas"},
    "decay in the gradient": {"formulas", "clipping"},
    "a stale clip factor": {"formulas", "clipping"},
    "one element beyond a block": {"guards"},
    "one element beyond a block of the norm": {"guards", "formulas"},
    "a step that is not skipped": {"skipping"},
    "a copy of the old weight": {"copies"},
}


def test_triton_keeps_every_check(interpret: Callable[..., Any]) -> None:
    assert interpret(failing, None) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(interpret: Callable[..., Any], fault: str) -> None:
    assert set(interpret(failing, fault)) == CAUGHT_BY[fault]


def test_a_hundred_steps_of_triton_are_the_formulas(interpret: Callable[..., Any]) -> None:
    found = interpret(distance, Case("triton", (15, 1025)), 100)
    assert found.weights < 1e-5 and found.moments < 1e-5 and found.norms < 1e-6, found


@pytest.mark.parametrize("gradient", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_narrow_and_misaligned_gradients(interpret: Callable[..., Any], gradient: torch.dtype, shift: int) -> None:
    found = interpret(distance, Case("triton", (16, 1025, 2048), gradient, shift=shift), 4)
    assert found.weights < 1e-5 and found.moments < 1e-5 and found.norms < 1e-6, found


def widened() -> bool:
    """The sums of the squares of bfloat16 gradients, one element each, are those of their float32 values."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(4)).bfloat16()
    subject = Subject(Case("triton", (1,), torch.bfloat16))
    (master,) = subject.masters
    assert master.grad is not None
    found = []
    for value in values:
        master.grad.fill_(value)
        found.append(subject.optimizer.square_sum([master.grad]))
    return torch.equal(torch.stack(found), values.float().square().double())


def test_the_interpreter_widens_bfloat16_exactly(interpret: Callable[..., Any]) -> None:
    assert interpret(widened)


def launches_and_tables() -> tuple[int, list[bool]]:
    """Launches of three steps over two groups; whether each step's table is the one before, the last one's gradients
    having moved."""
    case = Case("triton", (1, 16, 1025))
    subject, tables = Subject(case), []
    for number, gradients in enumerate(gradients_of(case, 3)):
        if number == 2:
            for master in subject.masters:
                master.grad = torch.zeros_like(master)
        subject.step(gradients, 0.01)
        (table,) = subject.optimizer._tables.values()
        tables.append((table.addresses, table.pairs))
    same = [tables[n][0] is tables[n - 1][0] and tables[n][1] is tables[n - 1][1] for n in (1, 2)]
    assert tables[2][1] is tables[1][1]
    return subject.optimizer.launches, same


def test_all_groups_are_one_launch_over_a_table_that_is_kept(interpret: Callable[..., Any]) -> None:
    assert interpret(launches_and_tables) == (3, [True, False])


def norms_of_a_part() -> tuple[list[float], float]:
    """Twice the sum of squares of two of the tensors' gradients, and in float64."""
    subject = Subject(Case("triton", (1023, 16, 1025)))
    for master, gradient in zip(subject.masters, next(gradients_of(subject.case, 1)), strict=True):
        master.grad = gradient
    chosen = [subject.masters[0].grad, subject.masters[2].grad]
    found = [subject.optimizer.square_sum(chosen).item() for _ in range(2)]  # type: ignore[arg-type]
    return found, sum(gradient.double().square().sum().item() for gradient in chosen if gradient is not None)


def test_the_norm_of_some_gradients_is_float64s_and_the_same_bits_again(interpret: Callable[..., Any]) -> None:
    found, exact = interpret(norms_of_a_part)
    assert found[0] == found[1] and abs(found[0] / exact - 1) < 1e-6
