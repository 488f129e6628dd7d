"""Activations, rotary positions and norms compiled for GPUs that are not there: nothing spills, all moves 128 bits at a time.

Each run compiles a few cases; `--all-kernels` compiles every one. The table has all of them.

python -m tests.kernels.test_rows_compiled      # prints the table for the installed Triton
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from tests.kernels.offline import Driver, Recorder
from tests.kernels.test_adamw_compiled import accesses, machine_code, numbers_of
from tests.kernels.workers import compiled_once

pytestmark = pytest.mark.thorough
TABLE = Path(__file__).with_name("rows_compiled.json")
ROWS, FEATURES = 4096, 4096
SCALARS = {"activation": 0, "rotary": 1, "norm": 6}  # accesses at most of a token's place, of rows' statistics and keys
SOURCES = ["kernels/triton/*.py", "kernels/*_triton.py", "kernels/rows.py", "tests/kernels/test_*_compiled.py"]


class Case(NamedTuple):
    """One way of calling an operator, forward and backward, on one device."""

    device: int
    operator: str
    dtype: str
    kind: str

    def __str__(self) -> str:
        return " ".join((f"sm_{self.device}", *self[1:]))


CASES = [
    *(
        Case(device, "activation", dtype, kind)
        for device in (80, 90, 100)
        for dtype in ("bfloat16", "float32")
        for kind in ("gelu biased", "silu gated")
    ),
    *(Case(90, "activation", "bfloat16", kind) for kind in ("gelu-tanh biased", "relu", "gelu gated biased", "narrow")),
    Case(90, "activation", "float16", "silu gated"),
    *(Case(device, "rotary", dtype, "128") for device in (80, 90, 100) for dtype in ("bfloat16", "float32")),
    *(Case(90, "rotary", "bfloat16", kind) for kind in ("64 placed", "80", "narrow")),
    Case(90, "rotary", "float16", "128"),
    *(
        Case(device, "norm", "bfloat16", f"layer {width} all")
        for device in (80, 90, 100)
        for width in (768, 4096, 8192)
    ),
    *(Case(device, "norm", "bfloat16", "rms 4096") for device in (80, 90, 100)),
    *(Case(90, "norm", "bfloat16", kind) for kind in ("rms 4096 added", "rms 8192 all", "narrow")),
    *(Case(90, "norm", "float32", f"{kind} all") for kind in ("layer 768", "layer 4096", "rms 4096")),
    Case(90, "norm", "float16", "layer 4096 all"),
]
FEW = [
    Case(90, "activation", "bfloat16", "gelu gated biased"),
    Case(80, "activation", "float32", "silu gated"),
    Case(90, "rotary", "bfloat16", "64 placed"),
    Case(100, "rotary", "float32", "128"),
    Case(90, "norm", "bfloat16", "layer 4096 all"),
    Case(80, "norm", "bfloat16", "rms 4096"),
]
Numbers = dict[str, dict[str, int]]  # by kernel


# -- what is compiled --------------------------------------------------------------------------------------------------


def run_activation(case: Case) -> None:
    from kernels import activation_triton as product

    curve, *words = ["gelu", "biased"] if case.kind == "narrow" else case.kind.split()
    features = 1 if case.kind == "narrow" else FEATURES
    width, dtype = features * (2 if "gated" in words else 1), getattr(torch, case.dtype)
    x, grad = torch.zeros(ROWS, width, dtype=dtype), torch.zeros(ROWS, features, dtype=dtype)
    bias = torch.zeros(width, dtype=dtype) if "biased" in words else None
    product.activate(x, bias, curve, "gated" in words)
    product.differentiate(grad, x, bias, curve, "gated" in words)


def run_rotary(case: Case) -> None:
    from kernels import rotary_triton as product

    size, *words = ["2"] if case.kind == "narrow" else case.kind.split()
    length, heads, groups = (1, 1, 1) if case.kind == "narrow" else (ROWS, 32, 8)
    y = torch.zeros(1, length, heads + 2 * groups, int(size), dtype=getattr(torch, case.dtype))
    q, k, _ = y.split((heads, groups, groups), dim=2)
    angles = torch.zeros(length, int(size) // 2)
    positions = torch.zeros(1, length, dtype=torch.int64) if words else None
    product.turn(q, k, angles, angles, positions, False)


def run_norm(case: Case) -> None:
    from kernels import norm_triton as product

    kind, width, *words = ["layer", "1", "all"] if case.kind == "narrow" else case.kind.split()
    layer, rows = kind == "layer", 1 if case.kind == "narrow" else ROWS
    x, weight = (torch.zeros(size, dtype=getattr(torch, case.dtype)) for size in ((1, rows, int(width)), int(width)))
    residual, bias = x if words else None, weight if layer else None
    keys, dropout = (torch.zeros(1, dtype=torch.int32), 0.1) if words == ["all"] else (None, 0.0)
    *_, statistics = product.normalise(x, residual, weight, bias, keys, layer, 1e-5, dropout, 3, 0)
    product.differentiate(x, residual, x, weight, keys, statistics, layer, layer, 1e-5, dropout, 3, 0)


OPERATORS: dict[str, tuple[Callable[[Case], None], tuple[str, ...]]] = {
    "activation": (run_activation, ("activation", "activation_backward")),
    "rotary": (run_rotary, ("rotary",)),
    "norm": (run_norm, ("norm", "norm_backward")),
}


def compiled(case: Case) -> Iterator[tuple[str, Any]]:
    """As the product's own launches compile them."""
    from triton.runtime.driver import driver

    driver.set_active(Driver(case.device))  # type: ignore[arg-type]
    module = import_module(f"kernels.triton.{case.operator}")
    run, names = OPERATORS[case.operator]
    with ExitStack() as stack:
        recorders = {name: Recorder(getattr(module, f"{name}_kernel")) for name in names}
        for name, recorder in recorders.items():
            stack.enter_context(mock.patch.object(module, f"{name}_kernel", recorder))
        run(case)
    for name, recorder in recorders.items():
        for built in recorder.compiled:
            yield name, built


def looked_at(case: Case) -> Numbers:
    """Of each kernel the numbers of its machine code, and how many of its accesses are of fewer than 128 bits."""
    found = {}
    for name, built in compiled(case):
        each = [access for stretch in accesses(machine_code(built)[1]) for access in stretch]
        found[name] = {**numbers_of(built), "narrow": sum(not access.endswith(".128") for access in each)}
    return found


# -- what is promised of it --------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = CASES if metafunc.config.getoption("--all-kernels") else FEW
        metafunc.parametrize("case", cases, ids=str)


def known() -> dict[str, Numbers]:
    import triton

    tables = json.loads(TABLE.read_text())
    assert triton.__version__ in tables, (
        f"no numbers for Triton {triton.__version__} in {TABLE.name}: look at what "
        "`python -m tests.kernels.test_rows_compiled` prints, and add it if it is no worse"
    )
    return tables[triton.__version__]


def unkept(case: Case, numbers: Numbers) -> list[str]:
    """What breaks a promise."""
    wrong = []
    for kernel, found in numbers.items():
        if found["stack"] or found["spills"]:
            wrong.append(f"{kernel} spills")
        if case.kind != "narrow" and found["narrow"] > SCALARS[case.operator]:
            wrong.append(f"{kernel} has {found['narrow']} narrow accesses")
        if case.kind != "narrow" and not (found["wide_loads"] and found["wide_stores"]):
            wrong.append(f"{kernel} moves nothing")
    return wrong


def test_all_moves_in_accesses_of_128_bits_and_nothing_spills(case: Case, request: pytest.FixtureRequest) -> None:
    numbers = compiled_once(request.config.cache, SOURCES, looked_at, case)
    assert unkept(case, numbers) == []
    wanted = known()[str(case)]
    for kernel, found in numbers.items():
        more = {name for name in found if found[name] > wanted[kernel][name]}
        assert more == set(), (kernel, found, wanted[kernel])


def test_the_table_has_every_case_and_holds_what_is_promised() -> None:
    assert list(known()) == list(map(str, CASES))
    assert [unkept(case, known()[str(case)]) for case in CASES] == [[]] * len(CASES)


def main() -> None:
    import triton

    print(json.dumps({triton.__version__: {str(case): looked_at(case) for case in CASES}}, indent=1))


if __name__ == "__main__":
    main()
