"""Where there is neither a GPU nor a compiler: the libraries still start and step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from unittest import mock

import torch

from tests.distributed import REPOSITORY, run_python, run_ranks

PROGRAM = """
import shutil, sys
assert not any(map(shutil.which, ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ninja")))
import torch
torch.set_num_threads(1)
from parallel.grid import start_grid, stop_grid
from parallel.layout import Layout
from pretrain.build import build
from pretrain.sizes import Sizes
from tests.parallel.test_boxes import VOCABULARY, make_config
from tests.parallel.test_zero import take_step

layout = Layout(zero=2, offload=True)  # at stage 1, and alone, there is nothing to share: no DeepSpeed
grid = start_grid(layout, 60)
for compute in ("fp32", "bf16"):
    built = build(make_config({"zero": 2, "offload": True}, compute), grid, Sizes(VOCABULARY))
    after = take_step(built, layout, None, 0)
    assert after.step.applied and after.updates == 1, after.step
assert "deepspeed" in sys.modules
print("stepped")
stop_grid()
"""


def test_deepspeed_starts_and_steps_without_a_compiler(tmp_path: Path) -> None:
    """In a folder of its own for compiled extensions, so that none is found that an earlier run has built."""
    assert shutil.which("sh"), "the PATH below keeps the shell"
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "uname", "env"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    (tmp_path / "step_once.py").write_text(PROGRAM)
    environment = {
        "PATH": str(tools),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(tmp_path)]),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "DS_ACCELERATOR": None,
        "CXX": None,
        "CC": None,
        "HOME": str(tmp_path),
    }
    result = run_python(["step_once"], env=environment)
    assert result.returncode == 0 and result.stdout.splitlines()[-1:] == ["stepped"], result.stdout + result.stderr
    assert not (tmp_path / "extensions").exists(), "something was compiled"


def patched(cuda: bool) -> dict[str, bool]:
    from megatron.core.pipeline_parallel import schedules

    from parallel import cpu

    before = (torch.cuda.current_device, torch.cuda.synchronize, schedules.torch)
    with mock.patch("torch.cuda.is_available", lambda: cuda):
        cpu.install()
    after = (torch.cuda.current_device, torch.cuda.synchronize, schedules.torch)
    names = ("current_device", "synchronize", "schedules' torch")
    return {name: old is not new for name, old, new in zip(names, before, after, strict=True)}


def test_nothing_is_patched_where_cuda_exists() -> None:
    assert not any(run_ranks(1, patched, True)[0].values())
    assert all(run_ranks(1, patched, False)[0].values())


def test_the_schedules_torch_allocates_on_the_cpu_and_is_torch_otherwise() -> None:
    from parallel.cpu import _TorchOnCpu

    torch_on_cpu = _TorchOnCpu("torch")
    for device in ("cuda", None, "cpu"):
        zeros = torch_on_cpu.zeros(2, 3, device=device, dtype=torch.float64)
        assert zeros.device.type == "cpu" and zeros.shape == (2, 3) and zeros.dtype == torch.float64
    assert torch_on_cpu.Tensor is torch.Tensor and torch_on_cpu.ones is torch.ones
