"""Speed of data selection on one CPU process: MinHash signatures from text against two libraries, and each step of a selection.

    python benchmarks/selection.py [--rounds 5] [--megabytes 4] [--text FILE_OR_FOLDER ...] [--json FILE]

  ours            texts to arrays of words, keys of five words in a row, a sketch of 128 values (pretrain.data.selection.minhash)
  datasketch      words by a regular expression, joined by five, MinHash.update_batch of 128 permutations
  rensa           the same shingles, RMinHash.digest_matrix_from_token_sets
  rensa, our keys our keys of five words in a row, RMinHash.digest_matrix_from_flat_token_hashes: a sketch by a library

In each round all run in turn over the same documents; what is claimed is the median over the rounds of the ratio within a
round, by processor seconds of all threads. The error of each one's estimates is measured beside: pairs of a document and a
copy with some of its words changed, against the true Jaccard similarity. A library that is not installed is left out. Then
come the steps of a selection by themselves, and the clustering of made-up signatures.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import REPOSITORY, about, ratios

sys.path.insert(0, str(REPOSITORY))

import numpy as np

from pretrain.data.documents import read_documents, stdlib_corpus, text_files
from pretrain.data.order import key
from pretrain.data.selection.clusters import cluster
from pretrain.data.selection.config import SelectionConfig
from pretrain.data.selection.minhash import shingles, signatures
from pretrain.data.selection.select import Selection
from pretrain.data.selection.signatures import Signatures, SignatureWriter
from pretrain.data.selection.words import Texts

PERMUTATIONS, SIZE = 128, 5
WORD = re.compile(r"[^\W_]+")
STEPS: dict[str, dict[str, Any]] = {
    "exact": {"exact": {}},
    "near (with the hash)": {"near": {}},
    "length": {"length": {"min_words": 50}},
    "gopher_quality": {"gopher_quality": {}},
    "gopher_repetition": {"gopher_repetition": {}},
    "c4": {"c4": {}},
    "language": {"language": {"keep": ["en"], "least": 0.0}},
}
Array = np.ndarray[Any, Any]
Sketch = Callable[[Sequence[str]], Array]


def main() -> int:
    args = _options().parse_args()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    texts = _texts(args)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {megabytes:.1f} MB", file=sys.stderr)
    sketches = {name: sketch for name, sketch in SKETCHES.items() if find_spec(name.split(",")[0]) or name == "ours"}
    minhash = _minhash(sketches, texts, megabytes, args.rounds)
    steps = _steps(texts, megabytes, args.rounds)
    packages = ["numpy", *(name for name in ("datasketch", "rensa", "py3langid") if find_spec(name))]
    sampled = (
        f"after a first pass of each, {args.rounds} rounds in turn over {len(texts)} documents of {megabytes:.1f} MB"
    )
    result = {
        "started": started,
        **about("selection", packages, 1, sampled),
        "minhash": minhash,
        "steps": steps,
        "clusters": _clusters(args.documents),
    }
    _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--megabytes", type=float, default=4, help="of text at most (default: 4)")
    parser.add_argument("--text", nargs="+", metavar="PATH", help="files or folders (default: Python's own sources)")
    parser.add_argument("--documents", type=int, default=200_000, help="to cluster (default: 200,000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    return parser


def _texts(args: argparse.Namespace) -> list[str]:
    files = text_files(args.text) if args.text else stdlib_corpus()
    texts, size = [], 0
    for document in read_documents(files):
        texts.append(document.text)
        size += len(document.text)
        if size > args.megabytes * 1e6:
            break
    return texts


# -- signatures ------------------------------------------------------------------------------------------------------


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """As selection takes them: of about 256 Ki characters."""
    first, size = 0, 0
    for place, text in enumerate(texts):
        size += len(text)
        if size >= 1 << 18:
            yield texts[first : place + 1]
            first, size = place + 1, 0
    if first < len(texts):
        yield texts[first:]


def _ours(texts: Sequence[str]) -> Array:
    parts = [signatures(Texts(group), "words", SIZE, PERMUTATIONS) for group in _groups(texts)]
    return np.concatenate(parts)


def _joined(text: str) -> list[str]:
    words = WORD.findall(text.lower())
    return [" ".join(words[place : place + SIZE]) for place in range(max(len(words) - SIZE + 1, 1))]


def _datasketch(texts: Sequence[str]) -> Array:
    from datasketch import MinHash  # type: ignore[import-untyped]

    found = []
    for text in texts:
        one = MinHash(num_perm=PERMUTATIONS, seed=1)
        one.update_batch([shingle.encode() for shingle in _joined(text)])
        found.append(one.hashvalues)
    return np.stack(found)


def _rensa(texts: Sequence[str]) -> Array:
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_token_sets([_joined(text) for text in texts], PERMUTATIONS, 1)
    return np.array(matrix.to_rows(), np.uint32)


def _rensa_of_keys(texts: Sequence[str]) -> Array:
    from rensa import RMinHash

    parts = []
    for group in _groups(texts):
        owners, keys = shingles(Texts(group), "words", SIZE)
        offsets = np.searchsorted(owners, np.arange(len(group) + 1)).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(keys, offsets, PERMUTATIONS, 1)
        parts.append(np.array(matrix.to_rows(), np.uint32))
    return np.concatenate(parts)


SKETCHES: dict[str, Sketch] = {
    "ours": _ours,
    "datasketch": _datasketch,
    "rensa": _rensa,
    "rensa, our keys": _rensa_of_keys,
}


def _minhash(sketches: dict[str, Sketch], texts: Sequence[str], megabytes: float, rounds: int) -> dict[str, Any]:
    names, speeds = list(sketches), []
    for sketch in sketches.values():
        sketch(texts[:20])
    for turn in range(rounds):
        turned = names[turn % len(names) :] + names[: turn % len(names)]
        found = {name: megabytes / _seconds(lambda name=name: sketches[name](texts)) for name in turned}  # type: ignore[misc]
        speeds.append({name: found[name] for name in names})
        told = ", ".join(f"{name} {found[name]:.1f}" for name in names)
        print(f"MinHash, round {turn + 1} of {rounds}: {told} MB a processor second", file=sys.stderr, flush=True)
    return {
        "megabytes_per_processor_second": speeds,
        "ratios": ratios(speeds, "ours", names[1:]),
        "mean_error": {name: _error(sketch, texts) for name, sketch in sketches.items()},
    }


def _seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _error(sketch: Sketch, texts: Sequence[str]) -> float:
    """Mean distance of estimates from the true similarity, of copies with a word in 5, 10, 20 ... changed."""
    errors = []
    for number, text in enumerate([text for text in texts if len(text) > 2000][:60]):
        words = WORD.findall(text[:20_000])
        other = list(words)
        for place in (key(number, np.arange(len(words) // (5 * 2 ** (number % 5)))) % np.uint64(len(words))).tolist():
            other[int(place)] = "changed"
        pair = [" ".join(words), " ".join(other)]
        one, two = (set(_joined(side)) for side in pair)
        first, second = sketch(pair)
        errors.append(abs(float((first == second).mean()) - len(one & two) / len(one | two)))
    return statistics.mean(errors) if errors else 0.0


# -- steps -----------------------------------------------------------------------------------------------------------


def _steps(texts: Sequence[str], megabytes: float, rounds: int) -> dict[str, list[float]]:
    """Megabytes a processor second of each step by itself."""
    found: dict[str, list[float]] = {}
    for name, sections in STEPS.items():
        if name == "language" and not find_spec("py3langid"):
            continue
        chosen = Selection(SelectionConfig.model_validate({"version": 1, **sections}))
        run = chosen.sign if chosen.needs_clusters else chosen.judge
        run(texts[:5])
        found[name] = [megabytes / _seconds(lambda run=run: run(texts)) for _ in range(rounds)]  # type: ignore[misc]
    return found


def _clusters(documents: int) -> dict[str, float]:
    """Documents of which one in ten is a copy, in pieces of 20,000, in 64 MiB of memory."""
    chosen = Selection(SelectionConfig.model_validate({"version": 1, "exact": {}, "near": {}}))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder, pieces = Path(name), {}
        for number, first in enumerate(range(0, documents, 20_000)):
            pieces[number] = folder / f"{number}.sign"
            with SignatureWriter(pieces[number], chosen.fingerprint, chosen.config.near) as writer:
                writer.add(_made(first, min(20_000, documents - first), documents))
        started = time.perf_counter()
        seconds = _seconds(lambda: cluster(pieces, folder / "out", chosen.config, chosen.fingerprint, 64 << 20))
        wall = time.perf_counter() - started
        size = sum(path.stat().st_size for path in pieces.values())
    return {
        "documents": documents,
        "signature_bytes": size,
        "processor_seconds": seconds,
        "seconds": wall,
        "documents_per_processor_second": documents / seconds,
    }


def _made(first: int, count: int, documents: int) -> Signatures:
    """Signatures of numbers, of which each tenth is that of an earlier one, but for a few values."""
    numbers = np.arange(first, first + count)
    sources = np.where(numbers % 10 == 9, (key(1, numbers) % np.uint64(documents)).astype(np.int64) // 10 * 10, numbers)
    sketches = (key(2, sources[:, None], np.arange(PERMUTATIONS)) >> np.uint64(32)).astype(np.uint32)
    sketches[numbers % 10 == 9, 5] = first
    nothing = np.zeros(count)
    return Signatures(
        np.stack([key(3, numbers), key(4, numbers)], axis=1),
        nothing.astype("u1"),
        nothing,
        sketches,
        np.zeros((0, 48), np.int64),
    )


def _print(result: dict[str, Any]) -> None:
    print(f"{result['hardware']['cpu']}, {result['versions']}")
    found = result["minhash"]
    for name, error in found["mean_error"].items():
        values = [speeds[name] for speeds in found["megabytes_per_processor_second"]]
        told = f"{statistics.median(values):.1f} MB a processor second ({min(values):.1f} to {max(values):.1f})"
        print(f"  {name:<22}{told:>48}, mean error {error:.4f}")
    for name, ratio in found["ratios"].items():
        print(f"  {name:<30}{ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f})")
    for name, values in result["steps"].items():
        print(
            f"  {name:<22}{statistics.median(values):>8.1f} MB a processor second ({min(values):.1f} to {max(values):.1f})"
        )
    clusters = result["clusters"]
    print(f"  clusters: {clusters['documents']:,} documents in {clusters['processor_seconds']:.1f} processor seconds")


if __name__ == "__main__":
    sys.exit(main())
