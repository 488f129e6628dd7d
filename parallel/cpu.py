"""What megatron-core 0.16.1 needs patched where there is no CUDA.

megatron-core names the CUDA device in a few allocations. Without a GPU, `install` points these at the CPU: the device that
its collectives and point-to-point buffers are made on, its synchronisations, and the three `torch.zeros(..., device="cuda")`
of its schedules. Nothing is touched where CUDA exists. The version is pinned because private names are patched.
"""

from __future__ import annotations

import types
from typing import Any

import torch


def install() -> None:
    if torch.cuda.is_available():
        return
    from megatron.core.pipeline_parallel import schedules

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    schedules.torch = _TorchOnCpu("torch")


class _TorchOnCpu(types.ModuleType):
    """The torch module as megatron-core's schedules see it: `zeros(device="cuda")` allocates on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)
