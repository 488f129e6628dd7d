"""The attention kernels compile for GPUs that are not there, and nothing spills.

Each run compiles a few cases, `--thorough` some more and `--all-kernels` every one. What a case compiled to is kept in
pytest's cache under a hash of the kernels' sources, so that only a change compiles again. No more registers, stack, spills
or shared memory than `compiled.json` has for this version of Triton: after a deliberate change, or for a new version, write
it anew with `python -m tests.kernels.offline` and look at the difference.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import pytest

from tests.kernels import offline
from tests.kernels.offline import CASES, SHARED_LIMIT, TABLE, TENSOR_CORE, Case
from tests.kernels.workers import compiled_once

Numbers = dict[str, dict[str, int]]  # by kernel
FEW = [
    Case(90, "bfloat16", 128, "causal"),
    Case(90, "bfloat16", 64, "dropout"),
    Case(90, "float16", 64, "causal"),
    Case(90, "float32", 64, "causal"),
    Case(80, "bfloat16", 64, "one"),
    Case(100, "bfloat16", 64, "causal"),
    Case(90, "bfloat16", 64, "bias"),
]
FEWER = FEW[:2] + FEW[4:6]
GROWING = ("registers", "stack", "STL", "LDL", "shared", "threads", "plain_dots")
SOURCES = ["kernels/triton/*.py", "kernels/tiles.py", "kernels/attention_launch.py", "tests/kernels/offline.py"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = CASES if metafunc.config.getoption("--all-kernels") else FEW
        marked = [pytest.param(case, marks=() if case in FEWER else pytest.mark.thorough) for case in cases]
        metafunc.parametrize("case", marked, ids=str, scope="module")


@pytest.fixture(scope="module")
def numbers(case: Case, request: pytest.FixtureRequest) -> Numbers:
    """What the kernels of the case compile to."""
    return compiled_once(request.config.cache, SOURCES, offline.compile_case, case)


def may_spill(case: Case) -> int:
    """Registers that may be put aside, stores and loads together; the table bounds them further.

    On Blackwell ptxas puts up to four of 255 aside though it has taken only half of them; float32 heads of 256, whose
    tiles cannot be smaller, do not fit, nor do those of 128 with a bias; nor need it all fit where nearly every feature
    comes together.
    """
    wide = case.dtype == "float32" and case.size >= (128 if "bias" in case.kind else 256)
    if case.kind.split()[-1] in ("all", "one") or wide:
        return 400
    return 8 if case.device == 100 else 0


def test_nothing_spills(case: Case, numbers: Numbers) -> None:
    for kernel, found in numbers.items():
        assert found["STL"] + found["LDL"] <= may_spill(case), kernel
        assert found["stack"] == 0 or may_spill(case) > 0, kernel


def test_it_fits_the_device(case: Case, numbers: Numbers) -> None:
    for kernel, found in numbers.items():
        assert found["shared"] <= SHARED_LIMIT[case.device], kernel
        assert found["registers"] * found["threads"] <= 65536, kernel


def test_every_product_is_on_the_tensor_cores(case: Case, numbers: Numbers) -> None:
    """Hopper's and Blackwell's own instructions for 16-bit types, not those of the generation before."""
    for kernel, found in numbers.items():
        assert found["plain_dots"] == 0, kernel
        if case.dtype == "float32":
            assert found["HMMA"] + found["HGMMA"] + found["UTCHMMA"] > 0, kernel
        else:
            others = set(TENSOR_CORE.values()) - {TENSOR_CORE[case.device]}
            assert found[TENSOR_CORE[case.device]] > 0, kernel
            assert all(found[name] == 0 for name in others), kernel


def test_tiles_come_by_descriptors_from_hopper_on(case: Case, numbers: Numbers) -> None:
    for kernel, found in numbers.items():
        assert (found["UTMALDG"] > 0) == (case.device >= 90 and case.dtype != "float32"), kernel


def test_nothing_has_grown(case: Case, numbers: Numbers) -> None:
    assert grown(table()[str(case)], numbers) == []


def table() -> dict[str, Numbers]:
    versions: dict[str, dict[str, Numbers]] = json.loads(TABLE.read_text())
    installed = version("triton")
    assert installed in versions, (
        f"{TABLE.name} has nothing for Triton {installed}: run python -m tests.kernels.offline"
    )
    return versions[installed]


def grown(before: Numbers, after: Numbers) -> list[str]:
    """What is more than it was."""
    return [
        f"{kernel} {name}: {before[kernel][name]} -> {after[kernel][name]}"
        for kernel in after
        for name in GROWING
        if after[kernel][name] > before[kernel][name]
    ]


def test_growth_is_told() -> None:
    before: dict[str, Any] = {"forward": dict.fromkeys(GROWING, 5), "key": dict.fromkeys(GROWING, 5)}
    after = {"forward": {**before["forward"], "registers": 6, "stack": 4}, "key": before["key"]}
    assert grown(before, before) == []
    assert grown(before, after) == ["forward registers: 5 -> 6"]


def test_the_table_has_every_case() -> None:
    assert list(table()) == [str(case) for case in CASES]


def test_the_table_holds_what_is_promised() -> None:
    """For all cases, not only those compiled in this run."""
    for case in CASES:
        test_nothing_spills(case, table()[str(case)])
        test_it_fits_the_device(case, table()[str(case)])
        test_every_product_is_on_the_tensor_cores(case, table()[str(case)])
        test_tiles_come_by_descriptors_from_hopper_on(case, table()[str(case)])
