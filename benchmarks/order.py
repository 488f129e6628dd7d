"""What the order of samples costs: to locate a batch, at the beginning and far from it, and to open an index of 10^13 tokens.

    python benchmarks/order.py [--rounds 30] [--json FILE]

Ten trillion tokens are four named sources of 2.5 trillion each, in sequences of 4,096; what is made of them are their manifests
alone, which is all that the order reads. The weights change twice.

  locate   1,024 sample numbers at once, at sample 0 and at sample 2.4 billion, one after the other in each round: processor
           milliseconds, the median of the rounds, and the ratio of the two
  start    in a process of its own, from the folders to the first batch's samples, and those at sample 10 and 10 billion: seconds
           by the clock, and the most memory that the process held
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from pretrain.config.load import checked_config
from pretrain.data import manifest as manifests
from pretrain.data import shards as layout
from pretrain.data.manifest import Manifest, Shard, canonical, describe
from pretrain.data.mixture import Mixture
from pretrain.data.order import Order
from pretrain.data.stream import source_of
from pretrain.schedule import Plan

SOURCES = ("books", "code", "math", "web")
TOKENS, LENGTH, BATCH = 10**13, 4096, 1024
FAR = 2_400_000_000  # about an epoch of ten trillion tokens
GOALS = {"milliseconds": 5.0, "ratio": 1.3, "seconds": 2.0, "mebibytes": 200.0}
TOKENIZER = b"the order reads no tokenizer, but for its hash"


def main() -> int:
    args = _options().parse_args()
    if args.start is not None:
        return _start(args.start)
    from common import about  # imports torch, which the process that is measured does without

    started = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for name in SOURCES:
            write_index(Path(folder) / name, TOKENS // len(SOURCES))
        located = _locate(mixture_of(Path(folder)).course().orders[0], args.rounds)
        start = [_in_a_process(folder) for _ in range(args.starts)]
    sampled = f"after one call of each, {args.rounds} rounds of both places in turn; {args.starts} processes to start"
    result = {"started": started, **about("order", ("numpy",), 1, sampled), "locate": located, "start": start}
    met = _print(result)
    if args.json:
        args.json.write_text(json.dumps({**result, "met": met}, indent=1) + "\n")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each place (default: 30)")
    parser.add_argument("--starts", type=int, default=3, help="processes that open the index (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # the process that is measured
    return parser


# -- ten trillion tokens -------------------------------------------------------------------------------------------------


def write_index(folder: Path, tokens: int) -> None:
    """A manifest of so many tokens, as `prepare` would write it, and the tokenizer that it names."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(TOKENIZER)
    empty = Manifest(
        folder=folder,
        fingerprint="",
        dtype=layout.dtype_of(1 << 16),
        tokens_per_chunk=layout.TOKENS_PER_CHUNK,
        vocab_size=1 << 16,
        tokenizer_file="tokenizer.model",
        tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest(),
        special={"eos": 2},
        documents=tokens // 1000,
        tokens=tokens,
        text_bytes=4 * tokens,
        shards=(),
    )
    firsts = range(0, empty.chunks, layout.CHUNKS_PER_SHARD)
    shards = tuple(_shard(number, first, empty) for number, first in enumerate(firsts))
    (folder / manifests.NAME).write_bytes(canonical(describe(dataclasses.replace(empty, shards=shards))))


def _shard(number: int, first: int, of: Manifest) -> Shard:
    last = min(first + layout.CHUNKS_PER_SHARD, of.chunks)
    names = layout.shard_name(number), layout.sidecar_name(number)
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    tokens = layout.tokens_before(last, of) - layout.tokens_before(first, of)
    size = layout.shard_bytes(layout.member_sizes(first, last, of))
    return Shard(names[0], size, last - first, tokens, digests[0], names[1], digests[1])


def mixture_of(folder: Path) -> Mixture:
    """The four sources, with three phases of weights: at the beginning, and from a tenth and a half of the run on."""
    named = {name: {"folder": str(folder / name), "weight": weight} for weight, name in enumerate(SOURCES, start=1)}
    curriculum = [
        {"from": "1T tokens", "weights": dict(zip(SOURCES, (4, 3, 2, 1), strict=True))},
        {"from": "5T tokens", "weights": dict(zip(SOURCES, (1, 1, 1, 1), strict=True))},
    ]
    values = {
        "data": {"train": named, "curriculum": curriculum, "seq_length": LENGTH},
        "batch": {"size": BATCH, "micro_size": 1},
        "schedule": {"total": "12T tokens"},
    }
    config = checked_config(values, "benchmarks/order.py")
    loaded = [Manifest.load(name) for name in config.data.train_folders]
    sizes = [source_of(manifest, LENGTH) for manifest in loaded]
    plan = Plan(config, sum(size.samples for size in sizes))
    return Mixture(config.data, config.data_seed, [manifest.tokens for manifest in loaded], [sizes], plan)


# -- measuring -----------------------------------------------------------------------------------------------------------


def _locate(order: Order, rounds: int) -> list[dict[str, float]]:
    """Processor milliseconds of a batch at both places, round by round."""
    places = {"at 0": np.arange(BATCH), "far": np.arange(FAR, FAR + BATCH)}
    for numbers in places.values():
        order.locate(numbers)
    found = []
    for turn in range(rounds):
        turned = list(places.items())[:: 1 if turn % 2 else -1]
        found.append({name: _milliseconds(order, numbers) for name, numbers in turned})
    return found


def _milliseconds(order: Order, numbers: np.ndarray[Any, Any], calls: int = 10) -> float:
    started = time.process_time()
    for _ in range(calls):
        order.locate(numbers)
    return (time.process_time() - started) * 1000 / calls


def _in_a_process(folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--start", folder]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(told)
    return found


def _start(folder: Path) -> int:
    """Open the index and locate; tells seconds and memory."""
    started, cpu = time.perf_counter(), time.process_time()
    order = mixture_of(folder).course().orders[0]
    for first in (0, 10, 10**10):
        order.locate(np.arange(first, first + BATCH))
    found = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - cpu}
    # Of getrusage a process has at least what its parent held when it was forked.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found["mebibytes"] = int(status["VmHWM"].split()[0]) / 2**10
    print(json.dumps(found))
    return 0


def _print(result: dict[str, Any]) -> bool:
    """Each number beside its goal. Returns whether all are met."""
    print(
        f"{result['hardware']['cpu']}, numpy {result['versions']['numpy']}, {TOKENS:,} tokens in {len(SOURCES)} sources"
    )
    near, far = ([turn[name] for turn in result["locate"]] for name in ("at 0", "far"))
    ratio = [one / other for one, other in zip(far, near, strict=True)]
    start = {name: [one[name] for one in result["start"]] for name in result["start"][0]}
    rows = [
        (f"locate {BATCH:,} samples at 0", near, "milliseconds", "ms of the processor"),
        (f"locate {BATCH:,} samples at {FAR:,}", far, "milliseconds", "ms of the processor"),
        ("the second over the first", ratio, "ratio", ""),
        ("start: open, and locate at 0, 10 and 10 billion", start["seconds"], "seconds", "s"),
        ("  of the processor", start["processor_seconds"], "seconds", "s"),
        ("  memory at most", start["mebibytes"], "mebibytes", "MiB"),
    ]
    met = True
    for name, values, goal, unit in rows:
        value = statistics.median(values)
        missed = value > GOALS[goal]
        met &= not missed
        spread = f"({min(values):,.2f} to {max(values):,.2f})"
        print(f"  {name:<50}{value:>10,.2f} {spread:>20}  goal {GOALS[goal]:g} {unit}{' MISSED' if missed else ''}")
    return met


if __name__ == "__main__":
    sys.exit(main())
