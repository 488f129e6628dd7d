"""What the layouts cost on this machine, at 1, 2 and 4 processes: time, communication, memory, checkpoints.

    python benchmarks/layouts.py [--only overhead loop checkpoint metadata memory] [--json FILE]

overhead    a step's time as computation, communication and the engine's own overhead, at ZeRO stages 0 to 3; whose Python
            it is; which group's communication a step waits for (benchmarks/overhead.py)
loop        the engine at ZeRO-0 and one process against the bare loop of the same model (benchmarks/bare.py)
checkpoint  the stall of a save against a copy of its bytes, its speed against the disk's own (benchmarks/checkpoints.py)
metadata    opening and planning a checkpoint of 1,024 ranks (benchmarks/metadata.py)
memory      the peak of each rank beside the formula (benchmarks/memory.py)

The model is configs/gpt/demo.yaml's, 5.3M parameters, in float32: 8 sequences of 256 tokens a step, in micro-batches of 2.
Checkpoints are those of a model of 93M parameters. Ranks share the machine's cores: where there are more processes than
cores, the time to wait for others is time that these computed, and says little of a machine with a core for each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import REPOSITORY, SHARDS, about, no_shards

sys.path.insert(0, str(REPOSITORY))
import tables

STAGES = range(4)
# (processes, layout). A process alone shares with nobody: stages 1 to 3 are stage 0 there.
OVERHEAD = [
    (1, "zero=0"),
    *((2, f"dp=2,zero={stage}") for stage in STAGES),
    (2, "tp=2,sp"),
    (2, "cp=2,zero=1"),
    (2, "pp=2"),
    *((4, f"dp=4,zero={stage}") for stage in STAGES),
    *((4, f"tp=2,sp,dp=2,zero={stage}") for stage in STAGES),
    (4, "cp=2,dp=2,zero=2"),
    *((4, f"pp=2,dp=2,zero={stage}") for stage in (0, 1)),
    (4, "tp=2,sp,pp=2"),
]
BF16 = "precision.compute=bf16"
MEMORY: list[tuple[int, str, list[str]]] = [
    (1, "zero=0", []),
    (1, "zero=0", ["batch.micro_size=8"]),
    (1, "zero=0", [BF16]),
    (1, "zero=0", ["parallel.recompute=full"]),
    (1, "zero=0", ["parallel.recompute=selective", "model.positions=alibi"]),
    (1, "zero=0", ["model.dropout=0.1"]),
    (2, "tp=2", []),
    (2, "tp=2,sp", []),
    (2, "cp=2", []),
    (2, "pp=2", []),
    *((2, f"dp=2,zero={stage}", []) for stage in STAGES),
    *((2, f"dp=2,zero={stage}", [BF16]) for stage in (1, 2, 3)),
    (2, "dp=2,zero=2,offload", []),
    (4, "pp=4", ["batch.micro_size=1"]),
    (4, "pp=2,vp=2,dp=2,zero=1", []),
    (4, "tp=2,sp,pp=2", []),
    (4, "tp=2,sp,dp=2,zero=3", []),
    (4, "cp=2,dp=2,zero=2", []),
]
CHECKPOINT = [(1, "zero=0"), (2, "dp=2,zero=1")]
PACKAGES = ("torch", "deepspeed", "megatron-core", "safetensors")


def main() -> int:
    args = _options().parse_args()
    if no_shards(args.shards):
        return 2
    started = datetime.now(UTC).isoformat(timespec="seconds")
    sections: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
        "overhead": _overhead,
        "loop": _loop,
        "checkpoint": _checkpoint,
        "metadata": _metadata,
        "memory": _memory,
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
        for name in args.only or sections:
            begin = time.perf_counter()
            found[name] = sections[name](args, Path(folder))
            _say(f"{name}: {time.perf_counter() - begin:.0f} s")
    cores = len(os.sched_getaffinity(0))
    sampled = f"after 2 steps of each layout, means over ranks; {args.steps} steps a measurement, {args.rounds} rounds"
    result = {
        "started": started,
        **about("layouts", PACKAGES, cores, sampled),
        "threads_of_a_rank": "cores / processes",
    }
    result.update(found)
    targets = tables.show(result)
    result["targets"] = targets
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("failed" in row for rows in found.values() if isinstance(rows, list) for row in rows) else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = ("overhead", "loop", "checkpoint", "metadata", "memory")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"some of: {', '.join(names)}")
    parser.add_argument("--steps", type=int, default=6, help="steps a measurement (default: 6)")
    parser.add_argument("--rounds", type=int, default=6, help="of what alternates (default: 6)")
    parser.add_argument("--processes", type=int, default=4, help="the most processes (default: 4)")
    parser.add_argument("--shards", type=Path, default=SHARDS, help="prepared text (default: shards)")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written: the disk to measure (default: /tmp)"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one layout (default: 600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ranks(args: argparse.Namespace, folder: Path, world: int, function: Callable[..., Any], *values: Any) -> Any:
    """Rank 0's result; {"failed": why} where a rank fails, so that the other layouts are still measured."""
    from pretrain import ranks

    try:
        return ranks.run_ranks(world, function, *values, folder=folder, timeout=args.timeout)
    except ranks.RankFailed as error:
        _say(f"failed: {error}")
        return {"failed": str(error).splitlines()[0]}


def _overhead(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from overhead import measure_bare, measure_layout
    from workload import write_config

    config = str(write_config(folder, args.shards))
    rows = [{"processes": 1, "layout": "bare loop", **_ranks(args, folder, 1, measure_bare, config, args.steps)}]
    for world, layout in OVERHEAD:
        if world <= args.processes:
            row = _ranks(args, folder, world, measure_layout, config, layout, args.steps)
            rows.append({"processes": world, "layout": layout, **row})
            _say(f"  {layout}: {row.get('step', 0) * 1e3:.0f} ms a step")
    return rows


def _loop(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from bare import compare_speed
    from workload import write_config

    found = {}
    for name, compile in (("eager", "never"), ("compiled", "always")):
        config = write_config(folder, args.shards, name, precision={"compile": compile})
        found[name] = _ranks(args, folder, 1, compare_speed, str(config), args.rounds, args.steps)
    return found


def _checkpoint(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from checkpoints import MODEL, measure
    from workload import write_config

    small = {"batch": {"size": 2, "micro_size": 1}, "data": {"seq_length": 64}}  # one step, to make the gradients
    config = str(write_config(folder, args.shards, "checkpoint", model=MODEL, **small))
    return [
        {"processes": world, "layout": layout, **_ranks(args, folder, world, measure, config, layout, args.rounds)}
        for world, layout in CHECKPOINT
        if world <= args.processes
    ]


def _metadata(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from metadata import measure

    return measure(folder)


def _memory(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from memory import measure
    from workload import write_config

    config, rows = str(write_config(folder, args.shards)), []
    for world, layout, overrides in MEMORY:
        if world > args.processes:
            continue
        found = _ranks(args, folder, world, measure, config, layout, overrides)
        row = {"processes": world, "layout": ",".join([layout, *(text.split(".")[1] for text in overrides)])}
        rows.append({**row, **(found if isinstance(found, dict) else {"ranks": found})})
    return rows


if __name__ == "__main__":
    sys.exit(main())
