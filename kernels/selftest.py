"""Attention's backend tried on this device before a run relies on it: output and gradients against torch's own operations.

The case is the one that gave NaN gradients in cuDNN (pytorch #196678): a length of 64 more than a multiple of 128, and all
scores so low that their sum of exponentials is below float32's least number.
"""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from kernels.backends import Backend, Call, attend
from kernels.noise import sample_keys

LENGTH = 704  # 5 * 128 + 64
INTERPRETED_LENGTH = 64  # Triton's interpreter takes seconds for more
LOWEST = -128.0  # about what all scores are; exp(-88.7) is float32's least normal number
DROPOUT = 0.1
FACTOR = 2.0  # of torch's own error in the same type
# Beyond that, of the largest element: what type's rounding of the probabilities alone can do.
SLACK = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class Broken(RuntimeError):
    """A kernel computes something else on this device than its reference."""


def check(backend: Backend, call: Call, device: torch.device, dtype: torch.dtype) -> None:
    """Raises Broken, naming device, driver, versions and shape."""
    if backend == "torch":
        return
    inputs = _inputs(call, device, dtype, INTERPRETED_LENGTH if device.type == "cpu" else LENGTH)
    options = _options(call, inputs[0])
    exact = _gradients("torch", [x.double() for x in inputs], options)
    plain = _gradients("torch", inputs, options)
    found = _gradients(backend, inputs, options)
    for name, want, near, got in zip(("output", "dQ", "dK", "dV"), exact, plain, found, strict=True):
        error, allowed = _distance(got, want), FACTOR * _distance(near, want) + SLACK[dtype]
        if not error <= allowed:  # NaN is not
            shape = f"{tuple(inputs[0].shape)} queries, {tuple(inputs[1].shape)} keys"
            raise Broken(
                f"the attention backend {backend} fails its self-test: {name} is off by {error:.2g} of its largest element, "
                f"at most {allowed:.2g} is allowed, for {shape}, {dtype}, {call}, on {where(device)}. "
                f"Set kernels.attention to another backend (torch works everywhere)"
            )


def where(device: torch.device) -> str:
    """The device, its driver and the versions that a report of a fault needs."""
    names = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is not None]
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    if device.type != "cuda":
        return f"{platform.processor() or platform.machine()} ({versions})"
    properties = torch.cuda.get_device_properties(device)
    driver = ".".join(str(part) for part in _driver())
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, driver {driver} "
        f"({versions}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()})"
    )


def _driver() -> tuple[int, int]:
    """The newest CUDA that the driver knows."""
    number = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return number // 1000, number % 1000 // 10


def _inputs(call: Call, device: torch.device, dtype: torch.dtype, length: int) -> list[Tensor]:
    """q, k, v and the gradient of the output: the query and key heads that share one are enough."""
    generator = torch.Generator().manual_seed(0)
    ratio = call.heads // call.groups
    level = (-LOWEST * call.size**-0.5) ** 0.5  # of each element: then q k / sqrt(D) is about LOWEST

    def noise(heads: int) -> Tensor:
        return torch.randn(1, length, heads, call.size, generator=generator)

    made = (level + 0.1 * noise(ratio), 0.1 * noise(1) - level, noise(1), noise(ratio))
    return [x.to(device, dtype) for x in made]


def _options(call: Call, q: Tensor) -> dict[str, Any]:
    length, ratio, device = q.shape[1], q.shape[2], q.device
    options: dict[str, Any] = {"causal": call.causal}
    if call.window is not None:
        options["window"] = min(call.window, length // 2)
    if call.documents:
        options["documents"] = (torch.arange(length, device=device) // (length // 3 + 1)).to(torch.int32)[None]
    if call.biased:
        options["slopes"] = torch.full((ratio,), 0.5, device=device)
    if call.dropout:
        options |= {"dropout": DROPOUT, "keys": sample_keys(1, torch.zeros(1, dtype=torch.int64)).to(device)}
    if call.softcap:
        options["softcap"] = 200.0
    return options


def _gradients(backend: Backend, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    *inputs, grad = inputs
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = attend(backend, *leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, of the largest element."""
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
