"""Model FLOPs utilisation of the real command on one GPU: GPT-3's sizes that fit it, from `metrics.jsonl`.

Each size trains by `python -m pretrain train` with its preset, in bf16 and compiled, data and logging included, in a process
of its own; what is told is the median over the logged intervals after the first. On a device whose peak is not known there
is no MFU, and tokens/s alone are told.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import REPOSITORY, SHARDS, about, no_shards

sys.path.insert(0, str(REPOSITORY))

import torch

from kernels.selftest import where
from pretrain.metrics import read_metrics

# By preset: micro-batch, sequences a step, recomputation. What fits 80 GiB, and is enough for the device.
SIZES: dict[str, tuple[int, int, str]] = {
    "gpt3-small": (16, 64, "none"),
    "gpt3-medium": (8, 32, "none"),
    "gpt3-xl": (8, 32, "selective"),
    "gpt3-6.7b": (1, 8, "full"),
}


def main() -> int:
    args = _options().parse_args()
    if no_shards(SHARDS):
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **about("mfu", ("torch", "deepspeed", "megatron-core"), torch.get_num_threads(), f"{args.steps} steps"),
        "device": where(device),
        "sizes": {name: _size(name, args) for name in args.sizes},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all("error" not in size for size in result["sizes"].values()) else 1


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["gpt3-small", "gpt3-medium", "gpt3-xl"], choices=[*SIZES, "demo"]
    )
    parser.add_argument("--steps", type=int, default=30, help="of each size (default: 30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("overrides", nargs="*", help="further settings of every run, section.key=value")
    return parser


def _size(name: str, args: argparse.Namespace) -> dict[str, Any]:
    micro, batch, recompute = SIZES.get(name, (8, 8, "none"))
    with tempfile.TemporaryDirectory(prefix="mfu-") as folder:
        command = [sys.executable, "-m", "pretrain", "train", f"configs/gpt/{name}.yaml", f"run.dir={folder}/run"]
        command += [f"data={{train: {SHARDS}/train, seq_length: {256 if name == 'demo' else 2048}}}", "batch.ramp=null"]
        command += [f"batch.size={batch}", f"batch.micro_size={micro}", f"parallel.recompute={recompute}"]
        command += [f"schedule={{kind: constant, total: {args.steps} steps}}", f"checkpoint.every={args.steps} steps"]
        command += ["monitor={log_every: 5 steps, tensorboard: false}", *args.overrides]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            error = (done.stderr or done.stdout).strip()[-2000:]
            print(f"{name}: exit code {done.returncode}: {error}", file=sys.stderr, flush=True)
            return {"error": error}
        lines = [line for line in read_metrics(Path(folder) / "run") if "tokens_per_second" in line][1:]
    # As one would type it, without where this machine keeps things.
    typed, began = (
        text.replace(f"{folder}/", "runs/").replace(f"{SHARDS.parent}/", "")
        for text in (shlex.join(["python", *command[1:]]), "\n".join(done.stdout.splitlines()[:4]))
    )
    found: dict[str, Any] = {"command": typed, "began": began.splitlines()}
    for field in ("tokens_per_second", "mfu", "hfu", "data_seconds", "step_seconds", "memory_bytes"):
        values = [line[field] for line in lines if field in line]
        if values:
            found[field] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    told = [f"{field} {found[field]['median']:.4g}" for field in found if isinstance(found[field], dict)]
    print(f"{name}: " + ", ".join(told), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
