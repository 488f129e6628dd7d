"""The optimizer's step against a plain copy of as many bytes, in one run, in turn.

What a step of AdamW must move: master, exp_avg and exp_avg_sq read and written, the gradient read, and with --copies the
bfloat16 weights written: 28 bytes a parameter, or 30. The copy reads half of that many bytes and writes the other half. What
is claimed is the median over the rounds of the ratio within a round: the share of the copy's bandwidth that the step reaches.

  step       clipping by a norm that is there already
  norm       the sum of the gradients' squares, 4 bytes a parameter
  torch      torch.optim.AdamW(fused=True), the same clipping

Shapes: 17M parameters in 78 tensors (6 layers, 384 hidden, learned positions), 67M in 4, and for GPUs 1.1B in 64. On a GPU
times are taken by CUDA events behind a wait on the device, so that the host's own time, which training hides, is left out;
elsewhere by the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from common import REPOSITORY, about, arguments, ratios, seconds

sys.path.insert(0, str(REPOSITORY))

import torch
from torch import Tensor

from kernels.adamw import AdamW

HIDDEN, VOCABULARY, POSITIONS = 384, 16384, 256
LAYER: list[tuple[int, ...]] = [*[(HIDDEN,)] * 5, (3 * HIDDEN,), (4 * HIDDEN,)]
LAYER += [(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "17M in 78": [*LAYER * 6, (VOCABULARY, HIDDEN), (POSITIONS, HIDDEN), *[(HIDDEN,)] * 10],
    "67M in 4": [(4096, 4096)] * 4,
    "1.1B in 64": [(4096, 4096)] * 64,
}
SMALL = ["17M in 78", "67M in 4"]
VARIANTS = ("step", "norm", "torch", "copy")
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def main() -> int:
    args = _options().parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    shapes = {name: _measure(name, device, args) for name in args.shapes}
    sampled = f"after {args.warmup} of each, {args.rounds} rounds of each in turn"
    result = {"started": started, **about("optimizer", ("torch",), args.threads, sampled), "shapes": shapes}
    if device.type == "cuda":
        result["hardware"]["gpu"] = torch.cuda.get_device_name(device)
    _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = arguments(__doc__, rounds=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on a CPU (default: all)")
    parser.add_argument("--warmup", type=int, default=3, help="runs of each before (default: 3)")
    parser.add_argument("--shapes", nargs="+", default=SMALL, choices=SHAPES, help="(default: the small)")
    parser.add_argument("--copies", action="store_true", help="the step writes bfloat16 weights too")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "torch"), help="(default: auto)")
    return parser


def _parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


class Subject:
    """What is measured of one list of shapes."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device, args: argparse.Namespace) -> None:
        ours, theirs = (_parameters(shapes, device) for _ in range(2))
        self.numel = sum(parameter.numel() for parameter in ours)
        self.optimizer = AdamW(ours, backend=args.backend, **OPTIONS)
        self.optimizer.start_state()
        if args.copies:
            self.optimizer.copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in ours}
        self.torch = torch.optim.AdamW(theirs, fused=True, **OPTIONS)
        self.norm = torch.full((), 2.0, dtype=torch.float64, device=device)
        self.torch.grad_scale = self.norm.float()  # type: ignore[attr-defined]
        self.torch.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        self.gradients: list[Tensor] = [p.grad for p in ours if p.grad is not None]
        self.bytes = {
            "step": (30 if args.copies else 28) * self.numel,
            "norm": 4 * self.numel,
            "torch": 28 * self.numel,
        }
        self.bytes["copy"] = self.bytes["step"] // 8 * 8
        self.source = torch.ones(self.bytes["copy"] // 8, device=device)
        self.target = torch.ones_like(self.source)

    def step(self) -> None:
        self.optimizer.bound(self.norm, 1.0)
        self.optimizer.step()

    def run(self, variant: str) -> Callable[[], Any]:
        return {
            "step": self.step,
            "norm": lambda: self.optimizer.square_sum(self.gradients),
            "torch": self.torch.step,
            "copy": lambda: self.target.copy_(self.source),
        }[variant]


def _measure(name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    subject = Subject(SHAPES[name], device, args)
    for variant in VARIANTS:
        for _ in range(args.warmup):
            seconds(subject.run(variant), device)
    rounds = []
    for turn in range(args.rounds):
        turned = VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]
        taken = {variant: seconds(subject.run(variant), device) for variant in turned}
        rounds.append({variant: subject.bytes[variant] / taken[variant] for variant in VARIANTS})
    shares = {name: share for variant in VARIANTS[:3] for name, share in ratios(rounds, variant, ["copy"]).items()}
    return {"parameters": subject.numel, "tensors": len(SHAPES[name]), "bytes_per_second": rounds, "ratios": shares}


def _print(result: dict[str, Any]) -> None:
    hardware = result["hardware"]
    print(f"{hardware.get('gpu', hardware['cpu'])}, {hardware['threads']} threads, torch {result['versions']['torch']}")
    for found in result["shapes"].values():
        print(f"{found['parameters']:,} parameters in {found['tensors']} tensors")
        for variant in VARIANTS:
            speeds = [speeds[variant] / 1e9 for speeds in found["bytes_per_second"]]
            share = found["ratios"].get(f"{variant} / copy")
            told = (
                "" if share is None else f"{share['median']:.2f} of the copy ({share['min']:.2f} to {share['max']:.2f})"
            )
            print(
                f"  {variant:<6}{statistics.median(speeds):>8.1f} GB/s ({min(speeds):.1f} to {max(speeds):.1f})  {told}"
            )


if __name__ == "__main__":
    sys.exit(main())
