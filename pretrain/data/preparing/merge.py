"""Pieces to shards. All counts are known, so that each shard is cut out of the pieces' tokens by itself.

WORK/layout.json         of each part: tokens, tokens a chunk, shards
WORK/train.starts        where each piece's tokens begin in the part, and their number; int64
WORK/train/000003.json   what the manifest says of shard 3, written when the shard is on the disk
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data import manifest as manifests
from pretrain.data.documents import Skipped
from pretrain.data.manifest import Manifest
from pretrain.data.packing import Packing
from pretrain.data.preparing.encoding import tokens_path
from pretrain.data.preparing.files import read_json, write_json, write_whole
from pretrain.data.preparing.options import PARTS, Part, Report, check_split
from pretrain.data.preparing.selecting import write_selection_report
from pretrain.data.preparing.tools import ENCODE, Beat, Job, Tools
from pretrain.data.shards import Entry, chunk_size, num_shards, tokens_before, write_shard
from pretrain.tokenization.base import Tokenizer

LAYOUT = "layout.json"
REPORT = "report.json"


class Lengths:
    """What the arithmetic of shards needs of a source."""

    def __init__(self, tokens: int, tokens_per_chunk: int, dtype: np.dtype[Any]) -> None:
        self.tokens, self.tokens_per_chunk, self.dtype = tokens, tokens_per_chunk, dtype


class Joined:
    """The tokens of all pieces' files of a part, one after the other, and document ends behind them."""

    def __init__(self, work: Path, part: str, dtype: np.dtype[Any], eos: int) -> None:
        self.work, self.part, self.dtype, self.eos = work, part, dtype, eos
        self.starts = np.fromfile(work / f"{part}.starts", "<i8")

    def read(self, start: int, count: int) -> np.ndarray[Any, Any]:
        """`count` tokens from `start` on."""
        found = np.full(count, self.eos, self.dtype)
        done, piece = 0, int(np.searchsorted(self.starts, start, side="right")) - 1
        while done < count and piece < len(self.starts) - 1:
            inside = start + done - int(self.starts[piece])
            length = min(int(self.starts[piece + 1]) - int(self.starts[piece]) - inside, count - done)
            if length > 0:
                self._fill(piece, inside, found[done : done + length])
            done, piece = done + max(length, 0), piece + 1
        return found

    def _fill(self, piece: int, inside: int, into: np.ndarray[Any, Any]) -> None:
        path = tokens_path(self.work, piece, self.part)
        with open(path, "rb", buffering=0) as file:
            file.seek(inside * self.dtype.itemsize)
            rest = into.data.cast("B")
            while rest:
                size = file.readinto(rest)
                if not size:
                    raise OSError(f"{path} is shorter than it was when it was written")
                rest = rest[size:]


def write_shard_of(tools: Tools, part: str, number: int, beat: Beat) -> None:
    """Write one shard of a part."""
    layout = read_json(tools.work / LAYOUT)[part]
    source = Lengths(layout["tokens"], layout["tokens_per_chunk"], tools.dtype)
    joined = Joined(tools.work, part, tools.dtype, tools.tokenizer.eos)

    def read(start: int, count: int) -> np.ndarray[Any, Any]:
        tokens = joined.read(start, count)
        beat(tokens.nbytes, count)
        return tokens

    entry = write_shard(tools.work.parent / part, number, source, tools.options.chunks_per_shard, read)
    tools.finish(Job(part, number), entry._asdict())


def merge(tools: Tools, strict: bool, run: Callable[[str], None]) -> Report:
    """Write shards and manifests. run: does all jobs of a stage. Raises UserError if a part has no documents."""
    report = _count(tools, strict)
    out = tools.work.parent
    for part in PARTS:
        if report.parts[part].documents:
            (out / part).mkdir(exist_ok=True)
            run(part)
    for part in PARTS:
        if report.parts[part].documents:
            layout = read_json(tools.work / LAYOUT)[part]
            entries = [Entry(**tools.result(Job(part, number))) for number in range(layout["shards"])]
            size, packing = layout["tokens_per_chunk"], tools.options.rows
            write_manifest(out / part, report.parts[part], tools.tokenizer, entries, size, packing)
    clear(out)
    with write_whole(out / REPORT) as file:  # last: it stands for all the rest
        file.write(manifests.canonical(report.as_json()))
    return report


def _count(tools: Tools, strict: bool) -> Report:
    """What all pieces told. From then on it is settled where each shard begins."""
    report = Report(tools.tokenizer.vocab_size, tools.tokenizer.sha256)
    starts = {part: bytearray(8) for part in PARTS}
    tally = tools.new_tally()
    for number in range(tools.plan.pieces):
        found = tools.result(Job(ENCODE, number))
        report.add(found)
        for part in PARTS:
            starts[part] += report.parts[part].tokens.to_bytes(8, "little")
        if tally is not None:
            tally.add(tally.from_json(found["tally"]))
    Skipped(strict).merge(report.skipped, report.examples)
    unused = Skipped()
    unused.merge(report.skipped, report.examples)
    if tally is not None:
        report.dropped = {reason: documents for reason, (documents, _) in tally.dropped.items()}
        unused.merge(report.dropped, {reason: [one.name for one in found] for reason, found in tally.examples.items()})
    check_split({part: report.parts[part].documents for part in PARTS}, unused, tools.options)
    if tally is not None:
        write_selection_report(tools, tools.work.parent, tally)
    layout = {}
    row = tools.options.rows.row
    for part in PARTS:
        if row > 1 and report.parts[part].documents:  # a chunk has a look-ahead, which the last row needs as the others
            report.parts[part].tokens += 1
            report.parts[part].padding += 1
        tokens = report.parts[part].tokens
        size = tools.options.tokens_per_chunk or chunk_size(tokens, row)
        lengths = Lengths(tokens, size, tools.dtype)
        shards = num_shards(lengths, tools.options.chunks_per_shard)
        layout[part] = {"tokens": tokens, "tokens_per_chunk": size, "shards": shards}
        with write_whole(tools.work / f"{part}.starts") as file:
            file.write(starts[part])
    write_json(tools.work / LAYOUT, layout)
    return report


def write_manifest(
    folder: Path,
    part: Part,
    tokenizer: Tokenizer,
    entries: list[Entry],
    tokens_per_chunk: int,
    packing: Packing,
) -> None:
    """The manifest of a part whose shards are written, and its tokenizer."""
    with write_whole(folder / tokenizer.file) as file:
        file.write(tokenizer.content)
    manifest = Manifest(
        folder=folder,
        fingerprint="",
        dtype=manifests.layout.dtype_of(tokenizer.vocab_size),
        tokens_per_chunk=tokens_per_chunk,
        vocab_size=tokenizer.vocab_size,
        tokenizer_file=tokenizer.file,
        tokenizer_sha256=tokenizer.sha256,
        special=tokenizer.special,
        documents=part.documents,
        tokens=part.tokens,
        text_bytes=part.text_bytes,
        shards=(),
        packing=packing,
        padding=part.padding,
    )
    first, shards = 0, []
    for entry in entries:
        last = first + entry.chunks
        tokens = tokens_before(last, manifest) - tokens_before(first, manifest)
        shards.append({**entry._asdict(), "tokens": tokens})
        first = last
    value = {**manifests.describe(manifest), "shards": shards}
    with write_whole(folder / manifests.NAME) as file:
        file.write(manifests.canonical(value))
    Manifest.load(folder)  # what was written is what will be accepted


def clear(out: Path) -> None:
    """Remove what writers that were killed left of their files."""
    for part in PARTS:
        for name in os.listdir(out / part) if (out / part).is_dir() else ():
            if name.startswith("."):
                (out / part / name).unlink()
