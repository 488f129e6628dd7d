"""What reading shards over http costs: processor time, bytes, and the loop's waits where every request takes a while.

    python benchmarks/remote.py [--chunks 64] [--rounds 5] [--latency 0.05] [--json FILE]

A web server on this machine, in a process of its own, has a source of random tokens in chunks of 2^19 (1 MiB each). In each
round, in turn, each over all chunks:

  stream        the stream as in training, over http, from an empty cache: order, reads ahead, checks, the cache's disk
  ranges        fsspec's own cat_ranges of the same chunks, 16 at a time, and nothing else
  local         the stream over the folder, whose chunks are checked as well

Told are MiB a processor second of the client, all threads, and the median over the rounds of the ratio within a round. Then the
server holds back every answer by --latency seconds while a loop takes its time over each batch, and each wait for a batch is
measured. Bytes are those that the server sent of shards and their hashes, over the chunks'.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import REPOSITORY, about, ratios

sys.path.insert(0, str(REPOSITORY))

import fsspec
import numpy as np
import synthetic

from pretrain.config.remote import CacheConfig, RemoteConfig
from pretrain.data.prefetch import prefetch
from pretrain.data.remote.access import Access
from pretrain.data.shards import TOKENS_PER_CHUNK
from pretrain.data.stream import Stream

VARIANTS = ("stream", "ranges", "local")
LENGTH, BATCH = 2048, 64
MIB = 2**20


def main() -> int:
    args = _options().parse_args()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, _server(Path(name)) as (url, ask):
        folder = Path(name) / "source"
        synthetic.make(folder, args.chunks * TOKENS_PER_CHUNK)
        rounds = [_round(turn, folder, f"{url}/source", args) for turn in range(-1, args.rounds)][1:]
        sent = _sent_a_chunk(folder, f"{url}/source", ask)
        waits = _waits(f"{url}/source", Path(name), args)
    sampled = f"after one of each, {args.rounds} rounds of {args.chunks} chunks of 1 MiB in turn"
    result = {
        "started": started,
        **about("remote", ("numpy", "fsspec", "aiohttp"), 1, sampled),
        "mib_per_processor_second": {"rounds": rounds, "ratios": ratios(rounds, "stream", VARIANTS[1:])},
        "bytes_sent_over_bytes_of_chunks": sent,
        "latency": waits,
    }
    _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--chunks", type=int, default=64, help="of 1 MiB (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--latency", type=float, default=0.05, help="seconds added to each answer (default: 0.05)")
    parser.add_argument("--step", type=float, default=0.05, help="seconds that the loop takes a batch (default: 0.05)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    return parser


# -- a round ---------------------------------------------------------------------------------------------------------


def _round(turn: int, folder: Path, url: str, args: argparse.Namespace) -> dict[str, float]:
    cache = tempfile.TemporaryDirectory(dir=folder.parent)  # emptied after the clock has stopped
    ways: dict[str, Callable[[], None]] = {
        "stream": lambda: _read(Stream([_access(cache.name).folder(url)], LENGTH, seed=1)),
        "ranges": lambda: _ranges(folder, url),
        "local": lambda: _read(Stream([folder], LENGTH, seed=1)),
    }
    found = {}
    for name in VARIANTS[turn % 3 :] + VARIANTS[: turn % 3]:
        before = time.process_time()
        ways[name]()
        found[name] = args.chunks / (time.process_time() - before)
    cache.cleanup()
    told = ", ".join(f"{name} {found[name]:,.0f}" for name in VARIANTS)
    print(f"round {turn + 1} of {args.rounds}: {told} MiB/processor second", file=sys.stderr, flush=True)
    return {name: found[name] for name in VARIANTS}


def _access(cache: str) -> Access:
    return Access(CacheConfig(dir=cache, size="4 GiB"), RemoteConfig())


def _read(stream: Stream) -> None:
    """An epoch, with one of a chunk's sequences: the rest costs no bytes and is measured by benchmarks/stream.py."""
    samples = np.arange(0, stream.samples_per_epoch, TOKENS_PER_CHUNK // LENGTH)
    parts = [samples[first : first + BATCH] for first in range(0, len(samples), BATCH)]
    for part in parts:
        stream.expect(np.zeros_like(part), part)
        stream.gather(np.zeros_like(part), part)
    stream.close()


def _ranges(folder: Path, url: str) -> None:
    system, stride = fsspec.filesystem("http", skip_instance_cache=True), MIB + 1024
    for shard in sorted(folder.glob("*.tar")):
        count = shard.stat().st_size // stride
        starts = [stride * index for index in range(count)]
        found = system.cat_ranges([f"{url}/{shard.name}"] * count, starts, [start + MIB + 514 for start in starts])
        assert all(len(data) == MIB + 514 for data in found)


def _sent_a_chunk(folder: Path, url: str, ask: Callable[[str], Any]) -> float:
    ask("forget")
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        _read(Stream([_access(cache).folder(url)], LENGTH, seed=1))
    sent = sum(size for path, size in ask("sent").items() if path.endswith((".tar", ".sha256")))
    chunks = Stream([folder], LENGTH, seed=1).manifests[0].chunks
    return float(sent / (chunks * (MIB + 2)))


def _waits(url: str, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Of a loop whose batches are of 4 samples, so that there are always chunks that it has not met."""
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        stream = Stream([_access(cache).folder(f"{url}/after-{args.latency}")], LENGTH, 1)
        waits = []
        with prefetch(stream, ((4 * step, 4) for step in range(64)), 0, 1, depth=2) as batches:
            for _ in range(64):
                started = time.perf_counter()
                next(batches)
                waits.append(time.perf_counter() - started)
                time.sleep(args.step)
        stream.close()
    return {
        "seconds": args.latency,
        "first_wait": waits[0],
        "longest_later_wait": max(waits[1:]),
        "later_waits_above_10_ms": sum(wait > 0.01 for wait in waits[1:]),
        "steps": len(waits),
    }


# -- the server ------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = Path()
    sent: dict[str, int] = {}  # noqa: RUF012
    lock = threading.Lock()

    def do_GET(self) -> None:
        found = re.fullmatch(r"(/\w+)(?:/after-([\d.]+))?/([\w.-]+)", self.path)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "bytes=0-999999999"))
        assert found and asked
        time.sleep(float(found[2] or 0))
        with open(f"{self.folder}{found[1]}/{found[3]}", "rb") as file:
            start = int(asked[1])
            size = max(0, min(int(asked[2]) + 1, os.fstat(file.fileno()).st_size) - start)
            self.send_response(206)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            done = 0
            while done < size:
                done += os.sendfile(self.connection.fileno(), file.fileno(), start + done, size - done)
        with self.lock:
            self.sent[found[3]] = self.sent.get(found[3], 0) + size

    def log_message(self, format: str, *args: Any) -> None: ...


def _serve(folder: Path, ours: Connection) -> None:
    _Handler.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ours.send(server.server_address[1])
    while (question := ours.recv()) != "end":
        ours.send(dict(_Handler.sent))
        if question == "forget":
            _Handler.sent.clear()


@contextmanager
def _server(folder: Path) -> Iterator[tuple[str, Callable[[str], Any]]]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(folder, theirs), daemon=True)
    process.start()

    def ask(question: str) -> Any:
        ours.send(question)
        return ours.recv()

    try:
        yield f"http://127.0.0.1:{ours.recv()}", ask
    finally:
        ours.send("end")
        process.join(10)


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['hardware']['cpu']}, fsspec {result['versions']['fsspec']}, aiohttp {result['versions']['aiohttp']}"
    )
    speeds = result["mib_per_processor_second"]
    for name in VARIANTS:
        values = [found[name] for found in speeds["rounds"]]
        told = f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
        print(f"  {name:<18}{told} MiB/processor second")
    for name, ratio in speeds["ratios"].items():
        print(f"  {name:<18}{ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f})")
    print(f"  bytes sent over bytes of the chunks used: {result['bytes_sent_over_bytes_of_chunks']:.4f}")
    waits = result["latency"]
    print(
        f"  {waits['seconds'] * 1000:.0f} ms added to each answer, {waits['steps']} steps: first wait "
        f"{waits['first_wait'] * 1000:.0f} ms, then {waits['later_waits_above_10_ms']} above 10 ms, the longest "
        f"{waits['longest_later_wait'] * 1000:.1f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
