"""A source's facts and counts for people, as tables and a histogram, or as JSON."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich import progress
from rich.console import Console
from rich.table import Table

from pretrain.data.inspecting.counting import MOST_HASHES, Counts, bins, chosen_runs, count, quantile
from pretrain.data.manifest import Manifest
from pretrain.printable import printable
from pretrain.tokenization.base import Tokenizer

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a character that has no piece of its own
FREQUENT = 20
BAR = 40  # columns
SHARES = {"least": 0.0, "median": 0.5, "nine of ten": 0.9, "longest": 1.0}


def tell_source(manifest: Manifest, console: Console, as_json: bool) -> dict[str, Any]:
    """Count a source and print what was found; with `as_json` only give it, as the JSON value."""
    tokenizer = manifest.tokenizer()  # first: it bounds the vocabulary, which the manifest could make anything
    with bar(
        "Counting", sum(last - first for first, last in chosen_runs(manifest)) * manifest.tokens_per_chunk
    ) as tell:
        counts = count(manifest, tell)
    found = {**facts(manifest), **counted(counts), "most_frequent": frequent(counts, tokenizer)}
    found |= byte_pieces(counts, tokenizer)
    if not as_json:
        _print(manifest, counts, found, console)
    return found


@contextmanager
def bar(title: str, total: int) -> Iterator[Any]:
    """A bar on standard error, where that is a terminal; gives the function that takes what was done."""
    console = Console(stderr=True)
    with progress.Progress(title, *progress.Progress.get_default_columns()[1:], console=console, transient=True,
                           disable=not sys.stderr.isatty()) as shown:  # fmt: skip
        task = shown.add_task("", total=total)
        yield lambda done: shown.advance(task, done)


def facts(manifest: Manifest) -> dict[str, Any]:
    """What the manifest says of all of the source."""
    return {
        "folder": str(manifest.folder),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "dtype": manifest.dtype.name,
        "text_bytes": manifest.text_bytes,
        "bytes_per_token": manifest.text_bytes / manifest.tokens,
        "tokens_per_byte": manifest.tokens / manifest.text_bytes if manifest.text_bytes else None,
        "packing": str(manifest.packing),
        "vocab_size": manifest.vocab_size,
        "special": manifest.special,
        "shards": len(manifest.shards),
        "chunks": manifest.chunks,
        "tokens_per_chunk": manifest.tokens_per_chunk,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "fingerprint": manifest.fingerprint,
    }


def counted(counts: Counts) -> dict[str, Any]:
    """What was counted, of `counted_tokens` tokens: all, or those of the chosen chunks."""
    lengths = counts.lengths
    return {
        "counted_all": counts.is_whole,
        "counted_chunks": counts.chunks,
        "counted_tokens": counts.tokens,
        "counted_documents": counts.documents,
        "cut_documents": counts.cut,
        "padding_share": counts.filler / counts.tokens,
        "document_tokens": {
            **{name: quantile(lengths, share) for name, share in SHARES.items()},
            "mean": sum(length * number for length, number in lengths.items()) / max(counts.documents, 1),
            "histogram": [list(bin) for bin in bins(lengths)],
        },
        "duplicates": {
            "documents": counts.hashed,
            "duplicates": counts.duplicates,
            "share": counts.duplicates / max(counts.hashed, 1),
            "most_copies": counts.most_copies,
        },
        "ids_used": int(np.count_nonzero(counts.ids)),
    }


def frequent(counts: Counts, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The ids that stand most often, the first of equals first."""
    most = np.argsort(-counts.ids, kind="stable")[:FREQUENT].tolist()
    return [
        {"id": index, "piece": tokenizer.piece(index), "count": number, "share": number / counts.tokens}
        for index in most
        if (number := int(counts.ids[index]))
    ]


def byte_pieces(counts: Counts, tokenizer: Tokenizer) -> dict[str, float]:
    """The shares of tokens that stand for what the vocabulary has no piece for."""
    of_bytes = [index for index in range(tokenizer.vocab_size) if BYTE_PIECE.fullmatch(tokenizer.piece(index))]
    unknown = int(counts.ids[tokenizer.special["unk"]]) if "unk" in tokenizer.special else 0
    return {
        "unknown_share": unknown / counts.tokens,
        "byte_share": int(counts.ids[of_bytes].sum()) / counts.tokens,
    }


def _print(manifest: Manifest, counts: Counts, found: dict[str, Any], console: Console) -> None:
    table = Table("", "", title=printable(str(manifest.folder)), show_header=False)
    for name, value in (*_fact_lines(found), *_counted_lines(counts, found)):
        table.add_row(name, value)
    console.print(table)
    what = "sources and targets" if manifest.pairs else "documents"
    console.print(f"{what} by length, in tokens with the end:")
    for line in histogram(counts, console):
        console.print(line)
    console.print(f"most frequent of {found['ids_used']:,} ids that occur:")
    for one in found["most_frequent"]:
        console.print(f"  {one['id']:>9} {one['count']:>13,} {one['share']:>7.2%}  {printable(one['piece'])}")


def _fact_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "documents", f"{found['documents']:,}"
    yield "tokens", f"{found['tokens']:,} ({found['dtype']})"
    ratio = f"{found['bytes_per_token']:.2f} per token"
    ratio += f"; {found['tokens_per_byte']:.3f} tokens a byte" if found["tokens_per_byte"] is not None else ""
    yield "bytes of text", f"{found['text_bytes']:,} ({ratio})"
    yield "packing", found["packing"]
    yield "vocabulary", f"{found['vocab_size']:,}"
    yield "special ids", ", ".join(f"{printable(name)} {index}" for name, index in found["special"].items())
    yield "shards", f"{found['shards']} of {found['chunks']} chunks, {found['tokens_per_chunk']:,} tokens each"
    yield "tokenizer", f"SHA-256 {found['tokenizer_sha256'][:16]}"
    yield "manifest", f"SHA-256 {found['fingerprint'][:16]}"


def _counted_lines(counts: Counts, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was counted, and of how much."""
    if counts.is_whole:
        yield "counted below", "all tokens"
    else:
        yield "counted below", f"a sample: {counts.tokens:,} tokens of {counts.chunks} chunks, the same at every call"
        yield "", f"{counts.documents:,} whole documents; {counts.cut} that the sample's borders cut are left out"
    lengths = found["document_tokens"]
    told = ", ".join(f"{name} {lengths[name]:,}" for name in SHARES)
    yield "tokens a document", f"{told}, mean {lengths['mean']:,.1f}"
    yield "padding", f"{found['padding_share']:.3%} of the tokens"
    copies = found["duplicates"]
    among = "" if counts.is_whole and counts.hashed < MOST_HASHES else f" of the {counts.hashed:,} that were compared"
    most = f"; the most copies of one: {copies['most_copies']:,}" if copies["duplicates"] else ""
    yield "exact duplicates", f"{copies['duplicates']:,} documents ({copies['share']:.2%}){among}{most}"
    yield "unknown, single bytes", f"{found['unknown_share']:.3%}, {found['byte_share']:.3%} of the tokens"


def histogram(counts: Counts, console: Console) -> Iterator[str]:
    """A line a bin: its lengths, its documents, and a bar."""
    block = "#" if console.options.ascii_only else "█"
    rows = list(bins(counts.lengths))
    most = max((number for _, _, number in rows), default=1)
    for least, last, number in rows:
        width = -(-BAR * number // most)
        yield f"  {least:>11,} to {last:<11,} {number:>11,} {number / counts.documents:>6.1%}  {block * width}".rstrip()
