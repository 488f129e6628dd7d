"""Whether Triton's kernels can run somewhere, and who computes where they are one of two. Imports no triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]
Wish = Literal["auto", "triton", "torch"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FIRST_CAPABILITY = (8, 0)  # what the kernels are compiled for in the tests


class Chosen(NamedTuple):
    """Who computes the parts of a model that are one of two's. `auto`: decided at the call."""

    loss: Wish = "auto"
    norm: Backend = "torch"
    rotary: Backend = "torch"
    activation: Backend = "torch"


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


def unsupported(x: Tensor) -> str:
    """Why Triton's kernels cannot run on x's type and device: one phrase, "" if they can."""
    if x.dtype not in DTYPES:
        return f"they take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if reason := no_triton(x.device):
        return reason
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return "Triton's interpreter is wrong about bfloat16"  # its products of matrices, and what it stores is cut off
    return ""


def must_run(x: Tensor) -> None:
    """Raises ValueError where Triton's kernels cannot run on x."""
    if reason := unsupported(x):
        raise ValueError(f"triton cannot run on {x.device}: {reason}. torch can")


def choose(
    wish: Wish, device: torch.device, why_not: Callable[[], str], preferred: Backend = "triton"
) -> tuple[Backend, str]:
    """Who computes there, and why not Triton where `auto` would prefer it, on a GPU. ValueError if the wish cannot be met.

    why_not: why Triton's kernels cannot, "" if they can; asked only where it matters. preferred: by `auto` on a GPU.
    """
    if wish == "torch" or (wish == "auto" and (device.type == "cpu" or preferred == "torch")):
        return "torch", ""
    reason = why_not()
    if reason and wish == "triton":
        raise ValueError(f"triton cannot run on {device}: {reason}. torch can")
    return ("torch" if reason else "triton"), reason
