"""Attention and the loss by every backend that this device has, forward and backward, in turn in one run.

  attention   (B, S) with B S = 16,384, 2,048 features in heads of 64 or 128: causal, full, a window of 1,024, 8 documents a
              sequence, dropout; FlexAttention too, which users compare with. TFLOP/s count the products of the keys that
              the mask shows: forward 4 D each, backward 2.5 times that (Dao 2023, "FlashAttention-2", section 4.1).
  loss        8,192 tokens over 32,768 to 131,072 classes: this project's linear + cross-entropy by Triton and by torch,
              torch's own whole logits, and F.linear_cross_entropy where torch has it. TFLOP/s count 8 M H V (two products
              a chunk beside the logits' own and its gradient's).

On a GPU times are medians of CUDA events; `--small` takes sizes that a CPU, Triton's interpreter even, gets through.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from common import REPOSITORY, about, arguments, seconds

sys.path.insert(0, str(REPOSITORY))

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.available import unsupported
from kernels.backends import BACKENDS, Call, attend, refusal
from kernels.cross_entropy import linear_cross_entropy
from kernels.noise import sample_keys
from kernels.selftest import where

FEATURES = 2048
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {"causal": False},
    "window": {"causal": True, "window": 1024},
    "documents": {"causal": True, "documents": 8},
    "dropout": {"causal": True, "dropout": 0.1},
}
BACKWARD = 2.5  # products of the backward pass for one of the forward


def main() -> int:
    args = _options().parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **about("kernels", ("torch", "triton"), torch.get_num_threads(), f"{args.rounds} rounds of each in turn"),
        "device": where(device),
        "clocks": _clocks(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": list(_attention(device, dtype, args)),
        "loss": list(_loss(device, dtype, args)),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = arguments(__doc__, rounds=30)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, to try the command")
    return parser


def _clocks(device: torch.device) -> dict[str, int]:
    """MHz as the run begins; empty where the driver does not tell."""
    if device.type != "cuda":
        return {}
    try:
        return {"sm_mhz": torch.cuda.clock_rate(device)}
    except (RuntimeError, ImportError, ModuleNotFoundError):  # needs pynvml
        return {}


# -- attention -----------------------------------------------------------------------------------------------------


def _attention(device: torch.device, dtype: torch.dtype, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    lengths, sizes, tokens, features = ((512, 1024, 2048, 4096, 8192, 16384), (64, 128), 16384, FEATURES)
    if args.small:
        lengths, sizes, tokens, features = (64,), (16,), 128, 32
    for size in sizes:
        for length in lengths:
            for mask in MASKS:
                yield from _one_attention(
                    device, dtype, args.rounds, tokens // length, length, features // size, size, mask
                )


def _one_attention(
    device: torch.device, dtype: torch.dtype, rounds: int, batch: int, length: int, heads: int, size: int, mask: str
) -> Iterator[dict[str, Any]]:
    q, k, v, grad = (torch.randn(batch, length, heads, size, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = _mask_options(mask, batch, length, device)
    call = Call(
        *(heads, heads, size, length, length, options["causal"], options.get("window"), "documents" in options),
        dropout="dropout" in options,
    )
    runs: dict[str, Callable[[], Tensor]] = {}
    for name in BACKENDS:
        if not refusal(name, call, device, dtype) and not (name == "torch" and length > 4096):  # which holds all scores
            runs[name] = lambda name=name: attend(name, *leaves, **options)  # type: ignore[misc]
    if device.type == "cuda" and mask != "dropout":
        runs["flex"] = _flex(leaves, mask, options)
    products = 4 * size * heads * batch * _pairs(mask, length)
    for name, (forward, both) in _in_turn(runs, leaves, grad, device, rounds).items():
        row = {"mask": mask, "batch": batch, "length": length, "heads": heads, "size": size, "backend": name}
        row |= {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * (both - forward)}
        row["forward_tflops"] = products / forward / 1e12
        row["backward_tflops"] = BACKWARD * products / max(both - forward, 1e-9) / 1e12
        print(
            f"{mask:10} {batch:3} x {length:5} {heads:2} x {size:3} {name:7} forward {row['forward_ms']:9.3f} ms "
            f"{row['forward_tflops']:6.1f} TFLOP/s  backward {row['backward_ms']:9.3f} ms {row['backward_tflops']:6.1f}",
            flush=True,
        )
        yield row


def _mask_options(mask: str, batch: int, length: int, device: torch.device) -> dict[str, Any]:
    options = dict(MASKS[mask])
    if "window" in options:
        options["window"] = min(options["window"], length // 2)
    if "documents" in options:
        numbers = torch.arange(length, device=device) // (length // options["documents"])
        options["documents"] = numbers.to(torch.int32).expand(batch, length).contiguous()
    if "dropout" in options:
        options["keys"] = sample_keys(1, torch.arange(batch)).to(device)
    return options


def _pairs(mask: str, length: int) -> int:
    """Of query and key that see each other."""
    if mask == "full":
        return length * length
    if mask == "window":
        window = min(MASKS[mask]["window"], length // 2)
        return length * window - window * (window - 1) // 2
    parts = MASKS[mask].get("documents", 1)
    part = length // parts
    return parts * part * (part + 1) // 2


def _flex(leaves: list[Tensor], mask: str, options: dict[str, Any]) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, documents, window = leaves[0].shape[1], options.get("documents"), options.get("window")

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = q >= k
        if window is not None:
            visible = visible & (q - k < window)
        if documents is not None:
            visible = visible & (documents[b, q] == documents[b, k])
        return visible

    rows = None if documents is None else leaves[0].shape[0]
    blocks = None if mask == "full" else create_block_mask(seen, rows, None, length, length, device=leaves[0].device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(*(x.transpose(1, 2) for x in leaves), block_mask=blocks).transpose(1, 2)


# -- the loss --------------------------------------------------------------------------------------------------------


def _loss(device: torch.device, dtype: torch.dtype, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shapes = (
        [(64, 32, 200)] if args.small else [(8192, 2048, v) for v in (32768, 50304, 131072)] + [(8192, 4096, 131072)]
    )
    for tokens, hidden, classes in shapes:
        x = torch.randn(1, tokens, hidden, device=device, dtype=dtype).requires_grad_()
        weight = (0.02 * torch.randn(classes, hidden, device=device, dtype=dtype)).requires_grad_()
        targets = torch.randint(classes, (1, tokens), device=device)
        mask = torch.ones(1, tokens, device=device)

        def ours(backend: str, rest: tuple[Any, ...] = (x, weight, targets, mask)) -> Tensor:
            return linear_cross_entropy(*rest, vocab_size=rest[1].shape[0], backend=backend)  # type: ignore[arg-type]

        def whole(x: Tensor = x, weight: Tensor = weight, targets: Tensor = targets) -> Tensor:
            return F.cross_entropy((x[0] @ weight.t()).float(), targets[0], reduction="sum")

        runs: dict[str, Callable[[], Tensor]] = {"torch": lambda: ours("torch"), "whole": whole}
        if not unsupported(x):
            runs["triton"] = lambda: ours("triton")
        if hasattr(F, "linear_cross_entropy"):
            runs["F.linear_cross_entropy"] = lambda x=x, w=weight, t=targets: F.linear_cross_entropy(  # type: ignore[misc]
                x[0], w, t[0], reduction="sum"
            )
        products = 8 * tokens * hidden * classes
        for name, (_, both) in _in_turn(runs, [x, weight], None, device, args.rounds).items():
            row = {"tokens": tokens, "hidden": hidden, "classes": classes, "backend": name, "ms": 1e3 * both}
            row |= {"tflops": products / both / 1e12, "peak_bytes": _peak(runs[name], [x, weight], device)}
            print(f"loss {tokens} x {hidden} x {classes} {name:22} {row['ms']:9.3f} ms {row['tflops']:6.1f} TFLOP/s")
            yield row


def _peak(run: Callable[[], Tensor], leaves: list[Tensor], device: torch.device) -> int | None:
    """Bytes beyond the inputs that one forward and backward takes."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    torch.autograd.grad(run(), leaves)
    return torch.cuda.max_memory_allocated(device) - before


# -- times -----------------------------------------------------------------------------------------------------------


def _in_turn(
    runs: dict[str, Callable[[], Tensor]], leaves: list[Tensor], grad: Tensor | None, device: torch.device, rounds: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of the forward pass, and of forward and backward together."""

    def both(run: Callable[[], Tensor]) -> None:
        torch.autograd.grad(run(), leaves, grad)

    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    for turn in range(-3, rounds):  # the first three warm up
        for name, run in runs.items():
            forward, whole = seconds(run, device), seconds(lambda run=run: both(run), device)  # type: ignore[misc]
            if turn >= 0:
                times[name][0].append(forward)
                times[name][1].append(whole)
    return {name: (statistics.median(a), statistics.median(b)) for name, (a, b) in times.items()}


if __name__ == "__main__":
    sys.exit(main())
