"""What reading costs a run: the first batch after a resume, a step, memory.

    python benchmarks/loading.py [--only resume step memory] [--json FILE]

resume   a fresh process that has imported what it needs: from opening the shards to its first batch, at sample 0 and at
         sample ten billion
step     a training step of configs/gpt/demo.yaml's model with its stream, from the order to micro-batches, beside one with
         the same batch every time: in turn in one process, by processor seconds of all threads and by the clock. Where
         other work disturbs this more than the difference is large: what its batches alone take, beside a step. Each chunk
         was read and hashed before, as almost all samples of a long run find it; benchmarks/stream.py counts the hashing
memory   a fresh process that reads thousands of batches: its resident memory after 100 of them and at the end, of a small
         corpus and of one sixteen times as large

The tokens are made for it. Nothing else in the run differs; the ratio is the median over the rounds of that within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import REPOSITORY, about, ratios

sys.path.insert(0, str(REPOSITORY))

import synthetic
from goals import aim, table_of
from rich.console import Console
from workload import start_run, write_config

from pretrain.data.stream import Stream, prefetch
from pretrain.step_data import StepData
from pretrain.train import Run

LENGTH, BATCH = 256, 16
SMALL, LARGE = 64, 1024  # megabytes of tokens
FAR = 10_000_000_000  # a sample number
WARM, READ = 400, 400  # batches without a step: until each chunk has been touched; to be measured
EARLY = 100  # steps after which memory is measured first
SECONDS, DEARER, GROWTH = 2.0, 1.01, 1.05  # what is aimed at, at most
METERS = ("processor", "clock")


def main() -> int:
    args = _options().parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child[0]](Path(args.child[1]), int(args.child[2]))))
        return 0
    started = datetime.now(UTC).isoformat(timespec="seconds")
    sections: dict[str, Callable[[argparse.Namespace, Path], Any]] = {
        "resume": _resume,
        "step": _step,
        "memory": _memory,
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
        found = {name: sections[name](args, Path(folder)) for name in args.only or sections}
    sampled = (
        f"{args.rounds} rounds of {args.steps} steps each way; {args.batches:,} batches of {BATCH} x {LENGTH} tokens"
    )
    result = {"started": started, **about("loading", ("numpy", "webdataset", "torch"), 1, sampled), **found}
    result["targets"] = _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = ("resume", "step", "memory")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"some of: {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=12, help="of steps (default: 12)")
    parser.add_argument("--steps", type=int, default=4, help="a round and way (default: 4)")
    parser.add_argument("--batches", type=int, default=10_000, help="that are read for their memory (default: 10,000)")
    parser.add_argument("--megabytes", type=int, default=LARGE, help=f"of the large corpus (default: {LARGE})")
    parser.add_argument("--folder", type=Path, help="where tokens are made: the disk to measure (default: /tmp)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # a part in a process of its own
    return parser


def _corpus(folder: Path, megabytes: int) -> Path:
    made = folder / f"made-{megabytes}" / "train"
    if not made.exists():
        synthetic.make(made, megabytes * 500_000)
    return made


def _alone(part: str, shards: Path, number: int) -> Any:
    """A part in a fresh process."""
    command = [sys.executable, __file__, "--child", part, str(shards), str(number)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return json.loads(ran.stdout.splitlines()[-1])


# -- parts -----------------------------------------------------------------------------------------------------------


def _resume(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    shards = _corpus(folder, args.megabytes)
    return [{"sample": number, **_alone("resume", shards, number)} for number in (0, FAR)]


def _first_batch(shards: Path, number: int) -> dict[str, float]:
    """Seconds from opening the shards to a first batch at sample `number`."""
    import webdataset.pipeline  # noqa: F401  what a run has imported by then

    started, cpu = time.perf_counter(), time.process_time()
    with prefetch(Stream([shards], LENGTH, seed=1), iter([(number, BATCH)]), 0, 1) as batches:
        next(batches)
    return {"clock": time.perf_counter() - started, "processor": time.process_time() - cpu}


def _memory(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    sizes = (SMALL, args.megabytes)
    return [{"megabytes": size, **_alone("memory", _corpus(folder, size), args.batches)} for size in sizes]


def _resident(shards: Path, count: int) -> dict[str, int]:
    """Bytes of this process after EARLY batches and after `count`."""
    found = {}
    with prefetch(Stream([shards], LENGTH, seed=1), ((step * BATCH, BATCH) for step in range(count)), 0, 1) as batches:
        for step, _ in enumerate(batches, start=1):
            if step in (EARLY, count):
                found[step] = _resident_now()
    return {"early": found[EARLY], "late": found[count]}


def _resident_now() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def _step(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    shards = _corpus(folder, SMALL)
    run = start_run(str(write_config(folder, shards.parent)), [])
    source, way = run.data(), ("stream", "constant")
    assert isinstance(source, Generator)
    _batches(source, WARM)
    held = next(source)
    _steps(run, iter([held, held]))
    rounds: dict[str, list[dict[str, float]]] = {meter: [] for meter in METERS}
    for turn in range(args.rounds):
        found = {}
        for name in way if turn % 2 else way[::-1]:
            found[name] = _steps(run, (next(source) if name == "stream" else held for _ in range(args.steps)))
        for index, meter in enumerate(METERS):
            rounds[meter].append({name: found[name][index] for name in way})
    alone = _batches(source, READ)
    source.close()
    median = statistics.median(one["constant"] for one in rounds["processor"]) / args.steps
    return {
        "alone": {"batch": alone, "step": median, "ratio": 1 + alone / median},
        **{
            meter: {"rounds": rounds[meter], **ratios(rounds[meter], "stream", ["constant"])["stream / constant"]}
            for meter in METERS
        },
    }


def _batches(source: Iterator[StepData], count: int) -> float:
    """Processor seconds of all threads for a batch, read ahead while no model computes."""
    cpu = time.process_time()
    for _ in range(count):
        next(source)
    return (time.process_time() - cpu) / count


def _steps(run: Run, steps: Iterator[StepData]) -> tuple[float, float]:
    """Processor seconds of all threads, and seconds, that training on these took, with what it took to get them."""
    started, cpu = time.perf_counter(), time.process_time()
    for data in steps:
        loss = run.forward_backward(data)
        update = run.update()
        run.advance(data, update)
        run.log(data, loss, update)
    return time.process_time() - cpu, time.perf_counter() - started


CHILDREN: dict[str, Callable[[Path, int], Any]] = {"resume": _first_batch, "memory": _resident}


# -- telling ---------------------------------------------------------------------------------------------------------


def _print(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What there is; returns the targets."""
    targets: list[dict[str, Any]] = []
    print(f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores, torch {result['versions']['torch']}")
    for one in result.get("resume", []):
        print(f"first batch at sample {one['sample']:,}: {one['clock']:.3f} s ({one['processor']:.3f} of a processor)")
        aim(targets, f"first batch at sample {one['sample']:,}, seconds", SECONDS, one["clock"])
    if "step" in result:
        for meter in METERS:
            one = result["step"][meter]
            spread = f"{one['median']:.4f} ({one['min']:.4f} to {one['max']:.4f})"
            print(f"a step with the stream / with a constant batch, by {meter}: {spread}")
        alone, found = result["step"]["alone"], result["step"]["processor"]["median"]
        told = f"{alone['batch'] * 1e3:.2f} ms of a processor, a step {alone['step'] * 1e3:,.0f}"
        print(f"a batch alone, from the order to micro-batches: {told}")
        aim(targets, "step with the stream / constant batch, by processor", DEARER, found)
        aim(targets, "(a step and its batch alone) / a step, by processor", DEARER, alone["ratio"])
    sizes = result.get("memory", [])
    for one in sizes:
        early, late = one["early"] / 1e6, one["late"] / 1e6
        print(f"{one['megabytes']} MB: {early:.1f} MB resident after {EARLY} batches, {late:.1f} at the end")
        aim(
            targets,
            f"memory at the end / after {EARLY} batches, {one['megabytes']} MB",
            GROWTH,
            one["late"] / one["early"],
        )
    if sizes:
        aim(targets, "memory of the large corpus / of the small one", GROWTH, sizes[1]["late"] / sizes[0]["late"])
    Console(highlight=False, width=110).print(table_of(targets))
    return targets


if __name__ == "__main__":
    sys.exit(main())
