"""Speed of preparing text, against the bare tokenizer and bare writes of the same tokens.

    python benchmarks/prepare.py [--rounds 4] [--megabytes 24] [--processes 2] [--json FILE]

The text is the standard library's own sources, again and again, as lines of JSON; the tokenizer is trained on it first.

  bare tokenizer     SentencePiece's encode of each document, which lie in memory, to numpy's arrays, which is faster than to
                     lists: no reading, no check, nothing kept
  prepare            from the file to a finished folder, in one process: reading, encoding, decoding again to see whether the
                     text comes back, the split, pieces, shards with their hashes, everything on the disk
  prepare, N         the same with N processes, the time that they take to start included
  raw writes         an array of tokens to a file (numpy's tofile) and to the disk
  shards             the same array as shards: tar members of a chunk each, SHA-256 of each chunk and of each shard

In each round all run in turn, so that slow phases of the machine meet all alike. What is claimed is the median over the rounds
of the ratio within a round, in processor seconds of all processes, which other work on the machine changes least; the ratio by
the clock, times the processes, is told beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import REPOSITORY, about, ratios

sys.path.insert(0, str(REPOSITORY))

import numpy as np

from pretrain.data.documents import read_documents, stdlib_corpus
from pretrain.data.prepare import prepare
from pretrain.data.preparing.files import sync
from pretrain.data.preparing.merge import Lengths
from pretrain.data.preparing.options import Options
from pretrain.data.shards import CHUNKS_PER_SHARD, TOKENS_PER_CHUNK, num_shards, write_shard
from pretrain.tokenization.foreign import load_tokenizer
from pretrain.tokenization.training import train_tokenizer

GOALS = {"prepare / bare tokenizer": 0.85, "prepare, N / bare tokenizer": 0.85, "shards / raw writes": 0.12}
OVERHEAD = 0.002  # of the bytes of shards over those of the tokens, at most
VARIANTS = ("bare tokenizer", "prepare", "prepare, N", "raw writes", "shards")


@dataclass
class Spent:
    """seconds by the clock, cpu of this process and of those that it started and that have ended."""

    seconds: float = 0.0
    cpu: float = 0.0


@contextmanager
def measured() -> Iterator[Spent]:
    """Filled when it is left."""
    spent, started, before = Spent(), time.perf_counter(), _cpu()
    yield spent
    spent.seconds, spent.cpu = time.perf_counter() - started, _cpu() - before


def _cpu() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


class Work:
    """The corpus, and each of the ways."""

    def __init__(self, folder: Path, megabytes: float, processes: int, tokens: int) -> None:
        self.folder, self.processes = folder, processes
        sources = [document.text for document in read_documents(stdlib_corpus())]
        self.model = folder / "tokenizer.model"
        train_tokenizer(sources, 8192, out=self.model)
        self.tokenizer: Any = load_tokenizer(self.model)
        self.texts: list[str] = []
        size = 0
        while size < megabytes * 1e6:
            self.texts.append(f"# {len(self.texts)}\n{sources[len(self.texts) % len(sources)]}")
            size += len(self.texts[-1].encode())
        self.bytes, self.corpus = size, folder / "corpus.jsonl"
        self.corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts))
        some = np.array(self.tokenizer.encode("".join(self.texts[:50])), np.uint16)
        self.tokens = np.resize(some, tokens)

    def run(self, variant: str) -> tuple[Spent, int]:
        """What a variant took, and how much it did: bytes of text, or tokens."""
        done: Callable[[], None] = {
            "bare tokenizer": self._bare,
            "prepare": lambda: self._prepare(1),
            "prepare, N": lambda: self._prepare(self.processes),
            "raw writes": self._raw,
            "shards": self._shards,
        }[variant]
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        with measured() as spent:
            done()
        return spent, self.bytes if variant in VARIANTS[:3] else len(self.tokens)

    def _bare(self) -> None:
        processor = self.tokenizer._processor
        for text in self.texts:
            processor.encode(text, return_type="numpy")

    def _prepare(self, processes: int) -> None:
        options = Options(tokenizer=self.model)
        prepare([self.corpus], self.folder / "out", options, processes=processes, say=lambda _: None)

    def _raw(self) -> None:
        (self.folder / "out").mkdir()
        path = self.folder / "out" / "tokens.bin"
        self.tokens.tofile(path)
        sync(path)

    def _shards(self) -> None:
        out = self.folder / "out"
        out.mkdir()
        source = Lengths(len(self.tokens), TOKENS_PER_CHUNK, np.dtype("<u2"))
        for number in range(num_shards(source, CHUNKS_PER_SHARD)):
            write_shard(out, number, source, CHUNKS_PER_SHARD, lambda start, count: self.tokens[start : start + count])

    def overhead(self) -> float:
        """Bytes of a folder of shards over those of its tokens, less one."""
        self.run("shards")
        files = sum(path.stat().st_size for path in (self.folder / "out").iterdir())
        return files / self.tokens.nbytes - 1

    def share_of_the_check(self) -> float:
        """Processor seconds of decoding what was encoded, over those of encoding it."""
        texts = self.texts[:200]
        with measured() as encoding:
            rows = [self.tokenizer.encode_array(text) for text in texts]
        with measured() as decoding:
            again = self.tokenizer.decode_many(rows)
        assert again == texts
        return decoding.cpu / encoding.cpu


def main() -> int:
    args = _options().parse_args()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    rounds: dict[str, list[dict[str, float]]] = {"cpu": [], "clock": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
        work = Work(Path(folder), args.megabytes, args.processes, args.tokens)
        for variant in VARIANTS:
            work.run(variant)
        for turn in range(args.rounds):
            order = VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]
            found = {variant: work.run(variant) for variant in order}
            rounds["cpu"].append({name: done / spent.cpu for name, (spent, done) in found.items()})
            rounds["clock"].append({name: done / spent.seconds for name, (spent, done) in found.items()})
            speeds = ", ".join(f"{name} {rounds['cpu'][-1][name] / 1e6:,.1f}" for name in VARIANTS)
            print(
                f"round {turn + 1} of {args.rounds}: {speeds} million a processor second", file=sys.stderr, flush=True
            )
        result = {
            "started": started,
            **about(
                "prepare", ("numpy", "sentencepiece"), 1, f"after a first pass of each, {args.rounds} rounds in turn"
            ),
            "text_bytes": work.bytes,
            "tokens_written": args.tokens,
            "processes": args.processes,
            "rounds": rounds,
            "ratios": {meter: _ratios(rounds[meter]) for meter in rounds},
            "overhead": work.overhead(),
            "share_of_the_check": work.share_of_the_check(),
        }
    _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="measurements of each (default: 4)")
    parser.add_argument("--megabytes", type=float, default=24, help="of text (default: 24)")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="that are written (default: 1e8)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, help=f"of `prepare, N` (default: one a core, {cores})")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    return parser


def _ratios(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {name: ratio for ours in VARIANTS[1:3] for name, ratio in ratios(rounds, ours, VARIANTS[:1]).items()}
    return found | ratios(rounds, "shards", ("raw writes",))


def _print(result: dict[str, Any]) -> None:
    versions = result["versions"]
    print(f"{result['hardware']['cpu']}, numpy {versions['numpy']}, sentencepiece {versions['sentencepiece']}")
    for name in VARIANTS:
        values = [speeds[name] / 1e6 for speeds in result["rounds"]["cpu"]]
        unit = "MB" if name in VARIANTS[:3] else "M tokens"
        print(
            f"  {name:<28}{statistics.median(values):>8,.1f} {unit} a processor second ({min(values):,.1f} to {max(values):,.1f})"
        )
    for name, ratio in result["ratios"]["cpu"].items():
        clock = result["ratios"]["clock"][name]["median"]
        by = result["processes"] if ", N" in name else 1
        told = f"{ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f}), by the clock {clock / by:.2f} x a process"
        print(f"  {name:<28}{told}; goal: at least {GOALS[name]}, {_judged(ratio['median'] >= GOALS[name])}")
    overhead = f"{result['overhead']:.2%}; goal: at most {OVERHEAD:.1%}, {_judged(result['overhead'] <= OVERHEAD)}"
    print(f"  {'bytes beside the tokens':<28}{overhead}")
    print(f"  {'decoding again / encoding':<28}{result['share_of_the_check']:.1%} of the processor seconds")


def _judged(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
