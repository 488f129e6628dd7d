"""Attention, the loss, norms, rotary positions and activations by every backend that this device has, in turn in one run.

  attention   (B, S) with B S = 16,384, 2,048 features in heads of 64 or 128: causal, full, a window of 1,024, 8 documents a
              sequence, dropout; FlexAttention too, which users compare with. TFLOP/s count the products of the keys that
              the mask shows: forward 4 D each, backward 2.5 times that (Dao 2023, "FlashAttention-2", section 4.1).
  loss        8,192 tokens over 32,768 to 131,072 classes: this project's linear + cross-entropy by Triton and by torch,
              torch's own whole logits, and F.linear_cross_entropy where torch has it. TFLOP/s count 8 M H V (two products
              a chunk beside the logits' own and its gradient's).
  rows        16,384 tokens: norms of 1,024 to 8,192 features, alone and with the residual sum and dropout; rotary positions
              of 32 + 8 heads of 128; activations with their bias. By Triton, by torch.compile of the same in torch, and by
              that eagerly. Bytes are those that must be moved; the share is of what a copy reaches in the same run.

On a GPU times are medians of CUDA events; `--small` takes sizes that a CPU, Triton's interpreter even, gets through.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from common import REPOSITORY, about, arguments, seconds

sys.path.insert(0, str(REPOSITORY))

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import activate
from kernels.available import unsupported
from kernels.backends import BACKENDS, Call, attend, refusal
from kernels.cross_entropy import linear_cross_entropy
from kernels.noise import sample_keys
from kernels.norm import add_norm, norm
from kernels.rotary import rotary_angles, rotary_pair
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
        "rows": list(_rows(device, dtype, args)),
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
    lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192, 16384)
    sizes: Sequence[int] = (64, 128)
    tokens, features = 16384, FEATURES
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
            runs[name] = functools.partial(attend, name, *leaves, **options)
    if device.type == "cuda" and mask != "dropout":
        runs["flex"] = _flex(leaves, mask, options)
    products = 4 * size * heads * batch * _pairs(mask, length)
    for measured, (forward, both) in _in_turn(runs, leaves, grad, device, rounds).items():
        row = {"mask": mask, "batch": batch, "length": length, "heads": heads, "size": size, "backend": measured}
        row |= {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * (both - forward)}
        row["forward_tflops"] = products / forward / 1e12
        row["backward_tflops"] = BACKWARD * products / max(both - forward, 1e-9) / 1e12
        print(
            f"{mask:10} {batch:3} x {length:5} {heads:2} x {size:3} {measured:7} forward {row['forward_ms']:9.3f} ms "
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
    q, k, v = leaves
    turned = lambda x: x.transpose(1, 2)  # noqa: E731
    return lambda: turned(compiled(turned(q), turned(k), turned(v), block_mask=blocks))


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


# -- norms, rotary positions, activations --------------------------------------------------------------------------


class Operator(NamedTuple):
    """A call by a backend, its inputs, and how many elements must be moved forward and backward."""

    name: str
    call: Callable[..., Any]  # (*inputs, backend)
    inputs: list[Tensor]
    forward: int
    backward: int


def _rows(device: torch.device, dtype: torch.dtype, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tokens, widths, features = (64, (48,), (40,)) if args.small else (16384, (1024, 4096, 8192), (4096, 14336))
    bandwidth = _copy_bandwidth(device, args)
    for operator in _operators(tokens, widths, features, device, dtype):
        leaves = [x.requires_grad_() for x in operator.inputs]
        compiled = torch.compile(operator.call, dynamic=False) if device.type == "cuda" else None
        runs: dict[str, Callable[[], Any]] = {"torch": lambda: operator.call(*leaves, backend="torch")}  # noqa: B023
        if compiled is not None:
            runs["compile"] = lambda: compiled(*leaves, backend="torch")  # noqa: B023
        if not unsupported(leaves[0]):
            runs["triton"] = lambda: operator.call(*leaves, backend="triton")  # noqa: B023
        with torch.no_grad():
            made = runs["torch"]()
        grad = torch.randn_like(made) if isinstance(made, Tensor) else [torch.randn_like(y) for y in made]
        for name, (forward, both) in _in_turn(runs, leaves, grad, device, args.rounds).items():
            backward = max(both - forward, 1e-9)
            row = {
                "operator": operator.name,
                "backend": name,
                "forward_ms": 1e3 * forward,
                "backward_ms": 1e3 * backward,
            }
            row["forward_share"] = operator.forward * dtype.itemsize / forward / bandwidth
            row["backward_share"] = operator.backward * dtype.itemsize / backward / bandwidth
            print(
                f"{operator.name:28} {name:8} forward {row['forward_ms']:8.3f} ms {row['forward_share']:5.2f} of a copy  "
                f"backward {row['backward_ms']:8.3f} ms {row['backward_share']:5.2f}",
                flush=True,
            )
            yield row


def _operators(
    tokens: int, widths: Sequence[int], features: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Iterator[Operator]:
    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    keys = sample_keys(1, torch.arange(4)).to(device)
    for width in widths:
        x, size = (4, tokens // 4, width), tokens * width

        def plain(x: Tensor, weight: Tensor, *, backend: Any) -> Tensor:
            return norm(x, weight, None, 1e-5, layer=False, backend=backend)

        def added(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, backend: Any) -> Any:
            return add_norm(
                x, residual, weight, bias, 1e-5, layer=True, dropout=0.1, keys=keys, site=1, backend=backend
            )

        yield Operator(f"rms {width}", plain, [made(*x), made(width)], 2 * size, 3 * size)
        inputs = [made(*x), made(*x), made(width), made(width)]
        yield Operator(f"sum, dropout, layer {width}", added, inputs, 4 * size, 5 * size)
    length, heads, groups, head = tokens // 4, 32, 8, 128
    cos, sin = (x.to(device) for x in rotary_angles(torch.arange(length), head))

    def turned(q: Tensor, k: Tensor, *, backend: Any) -> Any:
        return rotary_pair(q, k, cos, sin, None, backend)

    size = 2 * tokens * (heads + groups) * head
    yield Operator("rotary", turned, [made(4, length, heads, head), made(4, length, groups, head)], size, size)
    for width in features:
        for name, gated in (("gelu-tanh", 1), ("swiglu", 2)):

            def active(x: Tensor, bias: Tensor, *, backend: Any, name: str = name) -> Tensor:
                return activate(name, x, bias, backend)

            size = tokens * width
            inputs = [made(tokens, gated * width), made(gated * width)]
            yield Operator(f"{name} {width}", active, inputs, (gated + 1) * size, (2 * gated + 1) * size)


def _copy_bandwidth(device: torch.device, args: argparse.Namespace) -> float:
    """Bytes a second of a copy, those read and those written."""
    source = torch.empty(2**20 if args.small else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(args.rounds + 3)]
    return 2 * source.numel() / statistics.median(times[3:])


# -- times -----------------------------------------------------------------------------------------------------------


def _in_turn(
    runs: dict[str, Callable[[], Any]], leaves: list[Tensor], grad: Any, device: torch.device, rounds: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of the forward pass, and of forward and backward together."""

    def both(run: Callable[[], Any]) -> None:
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
