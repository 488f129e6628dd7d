"""The optimizer's kernels compiled for GPUs that are not there: nothing spills, and whole blocks move 128 bits at a time.

python -m tests.kernels.test_adamw_compiled      # prints the table for the installed Triton
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.thorough
TABLE = Path(__file__).with_name("adamw_compiled.json")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "": 0}


class Case(NamedTuple):
    device: int
    kernel: str
    gradient: str
    moment: str = ""
    copy: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (f"sm_{self.device}", *self[1:])))


CASES = [
    Case(90, "adamw", "fp32", "fp32"),
    Case(90, "adamw", "fp16", "fp32", "fp16"),
    Case(90, "adamw", "bf16", "bf16", "bf16"),
    *(Case(device, "adamw", "fp32", "fp32", "bf16") for device in (80, 90, 100)),
    *(Case(device, "square", "bf16") for device in (80, 90, 100)),
    Case(90, "square", "fp32"),
]


def compiled(case: Case, module: Any = None) -> Any:
    """As the product's launches compile it (`kernels.adamw_triton._launch`); module: in place of the product's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.language import bfloat16, float16, float32

    from kernels import adamw_triton

    elements = {"fp32": float32, "bf16": bfloat16, "fp16": float16, "": None}
    kernel = getattr(module or adamw_triton, f"{case.kernel}_kernel")
    pointers = {"table": "*i64", "pairs": "*i32", "counted": "*i32"}
    pointers |= dict.fromkeys(("decays", "divisor", "skipped", "corrections", "sums"), "*fp32")
    constants = {"GRADIENT": elements[case.gradient], "MOMENT": elements[case.moment], "COPY": elements[case.copy]}
    constants["BLOCK"] = adamw_triton.BLOCK
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "fp32")
        if name in constants:
            values[(place,)] = constants[name]
        elif name in pointers:
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": adamw_triton.NUM_WARPS, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", case.device, 32), options=options)


def machine_code(built: Any) -> tuple[str, str]:
    """The resources that it uses, and its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        return _tool("cuobjdump", "--dump-resource-usage", path), _tool("nvdisasm", "-c", path)


def _tool(name: str, *arguments: str | Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def accesses(code: str) -> list[list[str]]:
    """The loads from and stores to global memory of each stretch of code that is run from its first to its last line."""
    blocks: list[list[str]] = [[]]
    for line in code.splitlines():
        if re.match(r"\.L\w*:", line) or re.search(r"\b(BRA|EXIT|RET)\b", line):
            blocks.append([])
        blocks[-1] += re.findall(r"\b(?:LDG|STG)\.[\w.]*", line)
    return blocks


def numbers_of(built: Any) -> dict[str, int]:
    usage, code = machine_code(built)
    register, stack = (int(re.findall(rf"\b{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK"))
    found = [access for block in accesses(code) for access in block if access.endswith(".128")]
    return {
        "registers": register,
        "stack": stack,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": built.metadata.shared,
        "wide_loads": sum(access.startswith("LDG") for access in found),
        "wide_stores": sum(access.startswith("STG") for access in found),
    }


def expected_accesses(case: Case) -> tuple[int, int]:
    """Loads and stores of 128 bits that move a whole block."""
    from kernels.adamw_triton import BLOCK, NUM_WARPS

    each = BLOCK // (32 * NUM_WARPS)  # elements a thread
    masters, gradients, moments, copies = (
        each * BYTES[of] // 16 for of in ("fp32", case.gradient, case.moment, case.copy)
    )
    if case.kernel == "square":
        return gradients, 0
    return masters + gradients + 2 * moments, masters + 2 * moments + copies


def known() -> dict[str, dict[str, int]]:
    import triton

    tables = json.loads(TABLE.read_text())
    assert triton.__version__ in tables, (
        f"no numbers for Triton {triton.__version__} in {TABLE.name}: look at what "
        "`python -m tests.kernels.test_adamw_compiled` prints, and add it if it is no worse"
    )
    return tables[triton.__version__]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_whole_block_moves_in_accesses_of_128_bits_and_nothing_spills(case: Case) -> None:
    built = compiled(case)
    numbers = numbers_of(built)
    assert numbers["stack"] == numbers["spills"] == 0
    assert (numbers["wide_loads"], numbers["wide_stores"]) == expected_accesses(case)
    for block in accesses(machine_code(built)[1]):
        assert len({access.endswith(".128") for access in block}) < 2, "a narrow access on the way of the whole blocks"
    wanted = known()[str(case)]
    assert {name for name in wanted if numbers[name] > wanted[name]} == set(), (numbers, wanted)


def test_a_lost_promise_of_alignment_is_seen(tmp_path: Path) -> None:
    """The kernel stays right without it, so nothing but the machine code tells."""
    from kernels import adamw_triton

    promise = "    if WHOLE:\n        pointer = tl.multiple_of(pointer, 16)\n"
    source = Path(adamw_triton.__file__).read_text()
    assert source.count(promise) == 1
    (tmp_path / "faulty.py").write_text(source.replace(promise, ""))
    spec = importlib.util.spec_from_file_location("faulty", tmp_path / "faulty.py")
    assert spec is not None and spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    numbers = numbers_of(compiled(CASES[0], faulty))
    assert numbers["wide_loads"] == numbers["wide_stores"] == 0


def test_bfloat16_is_rounded_to_nearest() -> None:
    """Which the interpreter does not do."""
    code = compiled(Case(90, "adamw", "bf16", "bf16", "bf16")).asm["ptx"]
    assert set(re.findall(r"\bcvt\.(\w+)\.bf16\w*\.f32", code)) == {"rn"}


def test_the_table_has_every_case_and_no_other() -> None:
    assert set(known()) == set(map(str, CASES))


def main() -> None:
    import triton

    print(json.dumps({triton.__version__: {str(case): numbers_of(compiled(case)) for case in CASES}}, indent=1))


if __name__ == "__main__":
    main()
