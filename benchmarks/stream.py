"""Speed of the data stream on one CPU process, against a memory map of the same tokens and webdataset's own readers.

    python benchmarks/stream.py [--rounds 6] [--shapes 256x64 2048x32] [--shards DIR] [--json FILE]

The tokens are made for it, more of them than a processor's caches hold, or those of prepared shards.

All end in the same: batches of int64 tokens (B, T + 1), in memory.

  first epoch   the stream as in training: order, webdataset pipeline, prefetch thread; each chunk's SHA-256 is checked
  later epochs  the same stream again: chunks were checked
  memory map    the same sequences in the same order from a flat file, one row at a time; where they lie was looked up
                before the clock started
  webdataset    a stock reader of the same shards from first to last: no order, no check, no thread
  npy           a stock reader of a tar that has each sequence as an .npy of its own, as many people's shards do: of the first
                2 million tokens

In each round all run in turn, so that slow phases of the machine meet all alike, over the same number of tokens, from
warm page cache. What is claimed is the median over the rounds of the ratio within a round; the range is told beside it.
Each is told twice: by the clock, and by processor seconds of all threads, which other work on the machine changes less. What
is aimed at is told of the latter.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import REPOSITORY, about, no_shards, ratios

sys.path.insert(0, str(REPOSITORY))

import numpy as np
import synthetic
import webdataset
from goals import aim, table_of
from rich.console import Console
from webdataset.writer import TarWriter

from pretrain.data.prefetch import prefetch
from pretrain.data.stream import Stream

VARIANTS = ("first epoch", "later epochs", "memory map", "webdataset", "npy")
GOALS = {"first epoch / memory map": 0.25, "first epoch / npy": 10.0, "webdataset / memory map": 0.7}  # at least
NPY_TOKENS = 1 << 21
MOST = {"npy": NPY_TOKENS}  # tokens a measurement
METERS = ("tokens_per_second", "tokens_per_processor_second")
Tokens = np.ndarray[Any, Any]


def main() -> int:
    args = _options().parse_args()
    if args.shards is not None and no_shards(args.shards):
        return 2
    started = datetime.now(UTC).isoformat(timespec="seconds")
    shapes = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        shards = Path(folder) / "made" if args.shards is None else args.shards / "train"
        if args.shards is None:
            synthetic.make(shards, args.megabytes * 500_000)
        for text in args.shapes:
            length, batch = map(int, text.split("x"))
            shapes[text] = _measure(Reading(shards, length, batch, Path(folder)), text, args)
    sampled = f"after a first pass of each, {args.rounds} rounds of {args.tokens:,} tokens in turn, page cache warm"
    packages = ("numpy", "webdataset", "torch")
    result = {"started": started, **about("stream", packages, 1, sampled), "shapes": shapes}
    result["targets"] = _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="measurements of each (default: 6)")
    parser.add_argument("--tokens", type=int, default=40_000_000, help="read a measurement, at least (default: 4e7)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["256x64", "2048x32"],
        metavar="TxB",
        help="tokens a sequence x sequences a batch",
    )
    parser.add_argument("--shards", type=Path, help="folder with train/ (default: tokens are made)")
    parser.add_argument("--megabytes", type=int, default=128, help="of tokens that are made (default: 128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    return parser


class Reading:
    """One shape of batches, and an epoch of them in each of the ways."""

    def __init__(self, folder: Path, length: int, batch: int, scratch: Path) -> None:
        self.folder, self.length, self.batch = folder, length, batch
        self.stream = self.open()
        self.steps = self.stream.samples_per_epoch // batch
        manifest = self.stream.manifests[0]
        self.dtype, self.shards = manifest.dtype, [str(folder / shard.name) for shard in manifest.shards]
        flat = np.concatenate([*self._chunks(cut=1), self._last_token()])
        flat.tofile(scratch / "tokens.bin")
        self.memmap = np.memmap(scratch / "tokens.bin", self.dtype, "r")
        per_chunk = manifest.tokens_per_chunk // length
        chunks, places = np.divmod(self._samples(), per_chunk)
        self.starts = chunks * manifest.tokens_per_chunk + places * length
        self.check()
        self.npy = str(scratch / f"npy-{length}.tar")
        self._write_npy()

    def open(self) -> Stream:
        return Stream([self.folder], self.length, seed=1)

    def _samples(self) -> Tokens:
        """(steps, B): the samples of the first epoch's batches, as one rank takes them."""
        with prefetch(self.stream, self.plan(), 0, 1) as batches:
            return np.stack([self.stream.order.locate(numbers)[1] for numbers, _ in batches])

    def _chunks(self, cut: int = 0) -> Iterator[Tokens]:
        for sample in webdataset.WebDataset(self.shards, shardshuffle=False):
            tokens = np.frombuffer(sample["tok"], self.dtype)
            yield tokens[: len(tokens) - cut]

    def _last_token(self) -> Tokens:
        return list(self._chunks())[-1][-1:]

    def plan(self, epoch: int = 0) -> Iterator[tuple[int, int]]:
        first = epoch * self.stream.samples_per_epoch
        return ((first + step * self.batch, self.batch) for step in range(self.steps))

    def check(self) -> None:
        """The memory map must give what the stream gives, token for token."""
        for (_, ours), theirs in zip(self.from_stream(self.stream), self.from_memmap(), strict=True):
            assert np.array_equal(ours, theirs), "the memory map reads other tokens than the stream"

    def from_stream(self, stream: Stream, epoch: int = 0) -> Iterator[tuple[Tokens, Tokens]]:
        with prefetch(stream, self.plan(epoch), 0, 1) as batches:
            yield from batches

    def from_memmap(self) -> Iterator[Tokens]:
        for starts in self.starts:
            out = np.empty((self.batch, self.length + 1), np.int64)
            for row, start in zip(out, starts.tolist(), strict=True):
                row[:] = self.memmap[start : start + self.length + 1]
            yield out

    def _write_npy(self) -> None:
        with TarWriter(self.npy, encoder=False) as tar:
            for number in range(min(NPY_TOKENS, len(self.memmap) - 1) // self.length):
                first, held = number * self.length, io.BytesIO()
                np.save(held, self.memmap[first : first + self.length + 1])
                tar.write({"__key__": f"{number:08d}", "npy": held.getvalue()})

    def from_npy(self) -> Iterator[Tokens]:
        """Batches as webdataset's users make them: decoded, then stacked."""
        rows = (row for (row,) in webdataset.WebDataset(self.npy, shardshuffle=False).decode().to_tuple("npy"))
        while batch := list(itertools.islice(rows, self.batch)):
            yield np.stack(batch).astype(np.int64)

    def from_webdataset(self) -> Iterator[Tokens]:
        for tokens in self._chunks():
            rows = np.lib.stride_tricks.sliding_window_view(tokens, self.length + 1)[:: self.length]
            for first in range(0, len(rows), self.batch):
                yield rows[first : first + self.batch].astype(np.int64)

    def run(self, variant: str) -> tuple[Iterable[Any], Callable[[Any], int]]:
        """An epoch's batches, and the number of sequences in one of them. A first epoch's stream is opened here."""
        if variant == "first epoch":
            return self.from_stream(self.open()), lambda batch: len(batch[1])
        if variant == "later epochs":
            return self.from_stream(self.stream, epoch=1), lambda batch: len(batch[1])
        others = {"memory map": self.from_memmap, "webdataset": self.from_webdataset, "npy": self.from_npy}
        return others[variant](), len


def _measure(reading: Reading, text: str, args: argparse.Namespace) -> dict[str, Any]:
    for variant in VARIANTS:
        _speeds(reading, variant, 1)
    rounds: dict[str, list[dict[str, float]]] = {meter: [] for meter in METERS}
    for turn in range(args.rounds):
        turned = VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]
        speeds = {name: _speeds(reading, name, min(args.tokens, MOST.get(name, args.tokens))) for name in turned}
        for index, meter in enumerate(METERS):
            rounds[meter].append({variant: speeds[variant][index] for variant in VARIANTS})
        line = ", ".join(f"{variant} {speeds[variant][0] / 1e6:,.0f}" for variant in VARIANTS)
        print(f"{text}, round {turn + 1} of {args.rounds}: {line} million tokens/s", file=sys.stderr, flush=True)
    return {meter: {"rounds": rounds[meter], "ratios": _all_ratios(rounds[meter])} for meter in METERS}


def _all_ratios(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {name: ratio for ours in VARIANTS[:2] for name, ratio in ratios(rounds, ours, VARIANTS[2:]).items()}
    return {**found, **ratios(rounds, "webdataset", ["memory map"])}


def _speeds(reading: Reading, variant: str, tokens: int) -> tuple[float, float]:
    """Tokens a second and a processor second, over as many epochs as hold `tokens`. Opening shards is not counted."""
    seconds, cpu, done = 0.0, 0.0, 0
    while done < tokens:
        batches, sequences = reading.run(variant)
        started, cpu_started = time.perf_counter(), time.process_time()
        for batch in batches:
            done += sequences(batch) * reading.length
        seconds += time.perf_counter() - started
        cpu += time.process_time() - cpu_started
    return done / seconds, done / cpu


def _print(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What there is; returns the targets."""
    targets: list[dict[str, Any]] = []
    versions = result["versions"]
    print(f"{result['hardware']['cpu']}, numpy {versions['numpy']}, webdataset {versions['webdataset']}")
    for text, found in result["shapes"].items():
        length, batch = text.split("x")
        print(f"sequences of {length} tokens, batches of {batch}")
        print(" " * 28 + f"{'by the clock':>34}{'by processor seconds':>34}")
        for variant in VARIANTS:
            values = ([speeds[variant] / 1e6 for speeds in found[meter]["rounds"]] for meter in METERS)
            cells = (f"{statistics.median(v):,.0f} M tokens/s ({min(v):,.0f} to {max(v):,.0f})" for v in values)
            print(f"  {variant:<26}" + "".join(f"{cell:>34}" for cell in cells))
        for name in found[METERS[0]]["ratios"]:
            told = (found[meter]["ratios"][name] for meter in METERS)
            cells = (f"{ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f})" for ratio in told)
            print(f"  {name:<26}" + "".join(f"{cell:>34}" for cell in cells))
            if name in GOALS:
                aim(
                    targets,
                    f"{text}: {name}, by processor",
                    GOALS[name],
                    found[METERS[1]]["ratios"][name]["median"],
                    least=True,
                )
    Console(highlight=False, width=100).print(table_of(targets))
    return targets


if __name__ == "__main__":
    sys.exit(main())
