"""Compiles the kernels for GPUs that are not there, and reads what became of them.

The product's own launch code runs on CPU tensors; in place of the kernels stand recorders that compile what they are
launched with for the wanted device, so what is proved is what would run. ptxas, nvdisasm and cuobjdump are Triton's own.

    python -m tests.kernels.offline 90 bfloat16 128 causal      # one line a kernel
"""

from __future__ import annotations

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
    "window": {"causal": True, "window": 256},
    "documents": {"causal": True, "documents": True},
    "dropout": {"causal": True, "dropout": 0.1},
    "all": {"causal": True, "window": 256, "documents": True, "dropout": 0.1, "slopes": True, "softcap": 30.0},
    "unaligned": {"causal": True, "unaligned": True},  # so that Hopper takes pointers, not descriptors
}


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
        self.compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.compiled = self.kernel.warmup(*args, grid=grid, **kwargs)

        return launch


@contextmanager
def recording(device: int) -> Iterator[dict[str, Recorder]]:
    """Within it, attention on CPU tensors compiles for `device`; gives the recorders by the kernels' names."""
    from triton.runtime.driver import driver

    from kernels import flash_launch
    from kernels.triton import attention_backward, attention_forward

    driver.set_active(Driver(device))  # type: ignore[arg-type]
    with mock.patch.object(flash_launch, "capability", lambda _: device):
        recorders = {}
        patches = []
        for module, name in ((attention_forward, "forward"), (attention_backward, "key"), (attention_backward, "query")):
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
    """Numbers of the forward, the key and the query kernel."""
    from kernels import flash_launch
    from kernels.documents import bounds
    from kernels.flash import Options

    kind = dict(KINDS[case.kind])
    dtype = getattr(torch, case.dtype)
    shift = 1 if kind.get("unaligned") else 0
    packed = torch.zeros(2, 4096, 3, 4, case.size + shift, dtype=dtype)[..., shift:]
    q, k, v = packed.unbind(2)
    options = Options(
        kind["causal"], kind.get("window", 0), kind.get("dropout", 0.0), 3, 0, 0, case.size**-0.5, kind.get("softcap", 0.0)
    )
    slopes = torch.ones(4) if kind.get("slopes") else None
    keys = torch.zeros(2, dtype=torch.int32) if options.dropout else None
    seen = None
    if kind.get("documents"):
        numbers = torch.zeros(2, 4096, dtype=torch.int32)
        seen = bounds(numbers, numbers)
    with recording(case.device) as recorders:
        low, high = (None, None) if seen is None else (seen.key_low, seen.key_high)
        out, lse = flash_launch.forward(q, k, v, slopes, keys, low, high, options)
        flash_launch.backward(torch.zeros_like(out), q, k, v, out, lse, slopes, keys, seen, options)
        return {name: numbers_of(recorder.compiled) for name, recorder in recorders.items()}


def numbers_of(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes of stack and shared memory, and counts of instructions that tell how it was compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    register, stack = (int(re.findall(rf"\b{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK"))
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("STL", "LDL", "HMMA", "HGMMA", "UTCHMMA", "UTMALDG")}
    return {
        "registers": register,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        **counts,
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def dots_outside_tensor_cores(compiled: Any) -> int:
    return compiled.asm["ttgir"].count("#blocked") if "tt.dot" in compiled.asm["ttgir"] else 0


if __name__ == "__main__":
    device, dtype, size, kind = sys.argv[1:]
    for name, numbers in compile_case(Case(int(device), dtype, int(size), kind)).items():
        print(name, numbers)
