"""Whether Triton's kernels can run somewhere. Imports no triton."""

from __future__ import annotations

import importlib.util
import os

import torch

FIRST_CAPABILITY = (8, 0)  # what the kernels are compiled for in the tests


def no_triton(device: torch.device) -> str:
    """Why Triton's kernels cannot run there: one phrase, "" if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else "they run on a GPU; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"they run on NVIDIA GPUs, not on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, they need 8.0 or later"
    return ""
