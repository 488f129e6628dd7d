"""The loss's kernels compiled for GPUs that are not there: nothing spills, and logits move 128 bits at a time.

python -m tests.kernels.test_cross_entropy_compiled      # prints the table for the installed Triton
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from tests.kernels.offline import Driver, Recorder
from tests.kernels.test_adamw_compiled import accesses, machine_code, numbers_of
from tests.kernels.workers import compile_offline

pytestmark = pytest.mark.thorough
TABLE = Path(__file__).with_name("cross_entropy_compiled.json")


class Case(NamedTuple):
    """One way of calling an operator on one device."""

    device: int
    kernel: str
    dtype: str
    kind: str = "plain"  # plain; smoothed, with label smoothing; narrow, of one class, an integer that is compiled in

    def __str__(self) -> str:
        return " ".join((f"sm_{self.device}", *self[1:]))


CASES = [
    *(Case(d, kernel, of) for d in (80, 90, 100) for kernel in ("statistics", "slope") for of in ("bfloat16", "float32")),
    *(Case(90, kernel, "bfloat16", kind) for kernel in ("statistics", "slope") for kind in ("smoothed", "narrow")),
    *(Case(90, kernel, "float16") for kernel in ("statistics", "slope")),
]  # fmt: skip


def compiled(case: Case, source: str = "") -> Any:
    """As the product's own launch compiles it; source: of the kernels, in place of the product's."""
    from triton.runtime.driver import driver

    from kernels import cross_entropy_triton as product
    from kernels.triton import cross_entropy as module

    driver.set_active(Driver(case.device))  # type: ignore[arg-type]
    if source:
        spec = importlib.util.spec_from_file_location("faulty", source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    name = f"{case.kernel}_kernel"
    recorder = Recorder(getattr(module, name))
    width = 1 if case.kind == "narrow" else 50_304
    logits, targets = torch.zeros(4, width, dtype=getattr(torch, case.dtype)), torch.zeros(4, dtype=torch.int64)
    smoothing, real = 0.1 if case.kind == "smoothed" else 0.0, max(1, width - 47)
    with mock.patch("kernels.triton.cross_entropy", module), mock.patch.object(module, name, recorder):
        if case.kernel == "statistics":
            product.statistics(logits, targets, 0, real, smoothing > 0)
        else:
            product.write_slope(logits, torch.zeros(4, 4), targets, torch.zeros(4), 0, real, real, smoothing, 1e-4)
    return recorder.compiled[0]


def looked_at(case: Case, source: str = "") -> tuple[dict[str, int], list[list[str]]]:
    """Numbers of the machine code, and its accesses of each stretch (`tests.kernels.test_adamw_compiled.accesses`)."""
    built = compiled(case, source)
    return numbers_of(built), accesses(machine_code(built)[1])


def known() -> dict[str, dict[str, int]]:
    import triton

    tables = json.loads(TABLE.read_text())
    assert triton.__version__ in tables, (
        f"no numbers for Triton {triton.__version__} in {TABLE.name}: look at what "
        "`python -m tests.kernels.test_cross_entropy_compiled` prints, and add it if it is no worse"
    )
    return tables[triton.__version__]


def expected_accesses(case: Case) -> int:
    """Of 128 bits, for a block of classes: in the loop of whole blocks and in the last, masked one."""
    from kernels.cross_entropy_triton import LANES

    return 2 * LANES * getattr(torch, case.dtype).itemsize // 16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_move_in_accesses_of_128_bits_and_nothing_spills(case: Case) -> None:
    numbers, stretches = compile_offline(looked_at, case)
    assert numbers["stack"] == numbers["spills"] == 0
    if case.kind != "narrow":
        wide = expected_accesses(case)
        assert (numbers["wide_loads"], numbers["wide_stores"]) == (wide, wide if case.kernel == "slope" else 0)
    for stretch in stretches:
        logits = [access for access in stretch if access.endswith(".128")]
        assert not logits or len(logits) == len(stretch), "a narrow access on the way of the blocks"
    wanted = known()[str(case)]
    assert {name for name in wanted if numbers[name] > wanted[name]} == set(), (numbers, wanted)


def test_the_table_has_every_case_and_no_other() -> None:
    assert set(known()) == set(map(str, CASES))


def test_a_mask_by_the_real_classes_is_seen(tmp_path: Path) -> None:
    """The kernel stays right with it, so nothing but the machine code tells: 50,257 is no multiple of a wide access."""
    from kernels.triton import cross_entropy

    right, wrong = "mask=columns < width, other=0.0)", "mask=columns < real, other=0.0)"
    source = Path(cross_entropy.__file__).read_text()
    assert source.count(right) == 1
    path = tmp_path / "faulty.py"
    path.write_text(source.replace(right, wrong))
    case = Case(90, "statistics", "bfloat16")
    numbers, _ = compile_offline(looked_at, case, str(path))
    assert numbers["wide_loads"] < expected_accesses(case)


def main() -> None:
    import triton

    print(json.dumps({triton.__version__: {str(case): looked_at(case)[0] for case in CASES}}, indent=1))


if __name__ == "__main__":
    main()
