"""Compiles the kernels for GPUs that are not there, and reads what became of them.

The product's own launch code runs on CPU tensors; in place of the kernels stand recorders that compile what they are
launched with for the wanted device, so what is proved is what would run. ptxas, nvdisasm and cuobjdump are Triton's own.

    python -m tests.kernels.offline                                # writes compiled.json anew: many minutes
    python -m tests.kernels.offline "sm_90 bfloat16 128 causal"    # one case in it
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may ask for
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


class Case(NamedTuple):
    """One way of calling attention on one device."""

    device: int
    dtype: str
    size: int
    kind: str  # a key of KINDS

    def __str__(self) -> str:
        return f"sm_{self.device} {self.dtype} {self.size} {self.kind}"


KINDS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {"causal": False},
    "documents": {"causal": True, "documents": True},
    "dropout": {"causal": True, "dropout": 0.1},
    "all": {"causal": True, "window": 256, "documents": True, "dropout": 0.1, "slopes": True, "softcap": 30.0},
    "bias": {"causal": False, "bias": True},
    "causal bias": {"causal": True, "bias": True},
    "bias all": {"causal": True, "window": 256, "documents": True, "dropout": 0.1, "bias": True, "softcap": 30.0},
    # Integers of 1 are compiled in, as constants that are no tensors.
    "one": {"causal": True, "window": 256, "documents": True, "dropout": 0.1, "slopes": True, "shape": (1, 1, 1)},
    "bias one": {"causal": True, "window": 256, "documents": True, "dropout": 0.1, "bias": True, "shape": (1, 1, 1)},
}
CASES = [
    *(
        Case(d, "bfloat16", size, kind)
        for d in SHARED_LIMIT
        for size in (64, 128)
        for kind in KINDS
        if kind in ("causal", "full", "documents", "dropout")
    ),
    *(Case(d, "bfloat16", 256, "causal") for d in SHARED_LIMIT),
    *(Case(90, "bfloat16", size, "all") for size in (64, 128)),
    *(Case(d, "bfloat16", 64, "one") for d in SHARED_LIMIT),
    *(Case(d, "float16", size, "causal") for d in SHARED_LIMIT for size in (64, 128)),
    *(Case(d, "float32", size, "causal") for d in SHARED_LIMIT for size in (64, 128, 256)),
    *(Case(d, "bfloat16", size, "bias") for d in SHARED_LIMIT for size in (64, 128, 256)),
    *(Case(d, "float32", 64, "bias") for d in SHARED_LIMIT),
    Case(90, "float32", 128, "bias"),
    *(Case(90, "bfloat16", size, "causal bias") for size in (64, 128)),
    *(Case(90, "bfloat16", 64, kind) for kind in ("bias all", "bias one")),
]
TABLE = Path(__file__).parent / "compiled.json"  # by Triton's version, case and kernel: what `numbers_of` gives


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, device: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.device, self.target = device, GPUTarget("cuda", device, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class Recorder:
    """Stands in for a kernel: compiles where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))

        return launch


@contextmanager
def recording(device: int) -> Iterator[dict[str, Recorder]]:
    """Within it, attention on CPU tensors compiles for `device`; gives the recorders by the kernels' names."""
    from triton.runtime.driver import driver

    from kernels import attention_launch
    from kernels.triton import attention_backward, attention_bias, attention_forward

    driver.set_active(Driver(device))  # type: ignore[arg-type]
    with mock.patch.object(attention_launch, "capability", lambda _: device):
        recorders = {}
        patches = []
        for module, name in (
            (attention_forward, "forward"),
            (attention_backward, "key"),
            (attention_backward, "query"),
            (attention_bias, "bias"),
        ):
            recorders[name] = Recorder(getattr(module, f"{name}_kernel"))
            patches.append(mock.patch.object(module, f"{name}_kernel", recorders[name]))
        patches.append(mock.patch.object(attention_backward, "delta_kernel", Recorder(attention_backward.delta_kernel)))
        for patch in patches:
            patch.start()
        try:
            yield recorders
        finally:
            for patch in patches:
                patch.stop()


def compile_case(case: Case) -> dict[str, dict[str, int]]:
    """Numbers of the forward, the key and the query kernel, and of the bias kernel where there is a bias."""
    from kernels import attention_launch
    from kernels.attention_triton import Options
    from kernels.documents import bounds
    from kernels.relative import t5_buckets

    kind = dict(KINDS[case.kind])
    dtype = getattr(torch, case.dtype)
    batch, length, heads = kind.get("shape", (2, 4096, 4))
    q, k, v = torch.zeros(batch, length, 3, heads, case.size, dtype=dtype).unbind(2)
    options = Options(
        kind["causal"],
        kind.get("window", 0),
        kind.get("dropout", 0.0),
        3,
        0,
        0,
        case.size**-0.5,
        kind.get("softcap", 0.0),
    )
    slopes = torch.ones(heads) if kind.get("slopes") else None
    edges = t5_buckets(bidirectional=not options.causal)[0] if kind.get("bias") else None
    bias = None if edges is None else torch.zeros(heads, len(edges) + 1)
    keys = torch.zeros(batch, dtype=torch.int32) if options.dropout else None
    seen = None
    if kind.get("documents"):
        numbers = torch.zeros(batch, length, dtype=torch.int32)
        seen = bounds(numbers, numbers)
    with recording(case.device) as recorders:
        low, high = (None, None) if seen is None else (seen.key_low, seen.key_high)
        out, lse = attention_launch.forward(q, k, v, slopes, bias, edges, keys, low, high, options)
        attention_launch.backward(torch.zeros_like(out), q, k, v, out, lse, slopes, bias, edges, keys, seen, options)
        return {
            name if number == 0 else f"{name} {number + 1}": numbers_of(compiled)
            for name, recorder in recorders.items()
            for number, compiled in enumerate(recorder.compiled)
        }


def numbers_of(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes of stack and shared memory, and counts of instructions that tell how it was compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        ir = compiled.asm["ttgir"]
        plain = [line for line in ir.splitlines() if "tt.dot " in line and "#mma" not in line.rsplit("->", 1)[-1]]
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    register, stack = (int(re.findall(rf"\b{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK"))
    counts = {
        name: len(re.findall(rf"\b{name}\b", code)) for name in ("STL", "LDL", "HMMA", "HGMMA", "UTCHMMA", "UTMALDG")
    }
    return {
        "registers": register,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "plain_dots": len(plain),  # products outside of the tensor cores
        **counts,
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def write(cases: list[Case]) -> None:
    """Compile the cases and put their numbers into TABLE, case by case."""
    import triton

    for case in cases:
        whole = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        whole.setdefault(triton.__version__, {})[str(case)] = compile_case(case)
        version = {
            str(case): whole[triton.__version__][str(case)] for case in CASES if str(case) in whole[triton.__version__]
        }
        TABLE.write_text(json.dumps({**whole, triton.__version__: version}, indent=1) + "\n")
        print(case, version[str(case)], flush=True)


if __name__ == "__main__":
    write([case for case in CASES if not sys.argv[1:] or str(case) in sys.argv[1:]])
