"""`prepare --dry-run`: what would come of a corpus, from a sample of its documents; nothing is written.

The corpus is taken as ranges of about a mebibyte: small files whole, large files of lines or paragraphs in parts. Ranges are
read in the order of a hash of their names and places until enough documents are there, so the same corpus gives the same
sample. What is expected of the whole is what came of the sample, by the bytes of files. A compressed file, or one of a
foreign format, is read from its beginning; where it is not read to its end its bytes tell nothing, and it is left out of that.
"""

from __future__ import annotations

import heapq
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from pretrain.data.documents import Document, Skipped, TextFile, read_documents
from pretrain.data.encode import batches, encode
from pretrain.data.preparing import cutting
from pretrain.data.preparing.options import PARTS, Options, part_of
from pretrain.data.preparing.plan import state
from pretrain.data.preparing.sampling import train_on
from pretrain.data.shards import chunk_size, dtype_of, num_chunks
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import sample

if TYPE_CHECKING:
    from pretrain.data.selection.fates import Fates
    from pretrain.data.selection.select import Selection

DOCUMENTS = 2000  # of a sample, where the user names no number
RANGE = 1 << 20
MOST_OF_A_FILE = 500  # documents that are read of a file which cannot be read from its middle on
RANGES_A_DOCUMENT = 4  # at most: many files may hold none
MOST_BYTES = 256 << 20  # of a sample's text: it is kept in memory


@dataclass
class Rehearsal:
    """What came of the sample, and what that means for the whole."""

    files: int
    bytes: int  # of all files, as they lie there
    read_bytes: int = 0  # of those, what the sample was drawn from
    left_out: int = 0  # files of which only the beginning was read
    documents: int = 0
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))  # documents
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    skipped: Skipped = field(default_factory=Skipped)
    dropped: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)  # of each reason an example: its name, and what was measured
    altered: list[str] = field(default_factory=list)
    vocab_size: int = 0
    seconds: float = 0.0  # of a processor, for the sample
    copies_too: bool = False  # whether copies were looked for, in the sample alone

    @property
    def scale(self) -> float:
        """How many times the sample the whole is."""
        return self.bytes / self.read_bytes if self.read_bytes else 0.0


def rehearse(
    files: Sequence[TextFile], options: Options, tokenizer: Tokenizer | None, selection: Selection | None, count: int
) -> Rehearsal:
    """Read about `count` documents and do all to them but writing. tokenizer None: one is trained on the sample."""
    sizes = [max(state(file.path)[0], 0) for file in files]
    found = Rehearsal(len(files), sum(sizes))
    documents = list(_sample(files, sizes, options, tokenizer, found, count))
    found.documents = len(documents)
    started = time.process_time()
    kept = _selected(documents, selection, found)
    parts = [document.part or part_of(mark, options) for document, mark in kept]
    found.seconds += time.process_time() - started
    for part in parts:
        found.kept[part] += 1
    if tokenizer is None and kept:
        training = (one.text for (one, _), part in zip(kept, parts, strict=True) if part == "train")
        drawn = sample(training, options.max_train_bytes, options.seed)
        tokenizer = train_on(drawn, options, lambda _: None) if drawn else None
    if tokenizer is not None:
        found.vocab_size = tokenizer.vocab_size
        _count_tokens([one for one, _ in kept], parts, tokenizer, found)
    return found


def _sample(
    files: Sequence[TextFile],
    sizes: Sequence[int],
    options: Options,
    tokenizer: Tokenizer | None,
    found: Rehearsal,
    count: int,
) -> Iterator[Document]:
    marked = ((_mark(file, start), place, start) for place, start, file in _ranges(files, sizes, options))
    taken, text = 0, 0
    for _, place, start in heapq.nsmallest(RANGES_A_DOCUMENT * count, marked):
        if taken >= count or text >= MOST_BYTES:
            break
        started = time.process_time()
        file, size, whole = _opened(files[place], sizes[place], start, options)
        reading = read_documents([file], options.split, options.text_field, found.skipped, tokenizer, options.eos_id)
        documents = list(reading if whole else islice(reading, MOST_OF_A_FILE))
        found.seconds += time.process_time() - started
        if whole or len(documents) < MOST_OF_A_FILE:
            found.read_bytes += size
        else:
            found.left_out += 1
        taken += len(documents)
        text += sum(len(document.text) for document in documents)
        yield from documents


def _ranges(files: Sequence[TextFile], sizes: Sequence[int], options: Options) -> Iterator[tuple[int, int, TextFile]]:
    """(place of the file, where a range begins, file)"""
    for place, (file, size) in enumerate(zip(files, sizes, strict=True)):
        step = RANGE if cutting.is_cut(file, options.split) else max(size, 1)
        yield from ((place, start, file) for start in range(0, max(size, 1), step))


def _mark(file: TextFile, start: int) -> int:
    return xxhash.xxh64_intdigest(f"{file.name}\0{start}".encode("utf-8", "surrogateescape"))


def _opened(file: TextFile, size: int, start: int, options: Options) -> tuple[TextFile, int, bool]:
    """A range as a file, its bytes, and whether all of it is to be read. Its lines are counted from where it begins."""
    if not cutting.is_cut(file, options.split):
        return file, size, not file.is_compressed and not (file.is_json_lines and size > RANGE)
    if size <= RANGE:
        return file, size, True
    span = cutting.range_at(file, size, start, RANGE, options.split)
    name = f"{file.name} from byte {span.start:,}" if span.start else file.name
    return TextFile(file.path, name, (span.start, span.end), file.part), span.end - span.start, True


def _selected(documents: list[Document], selection: Selection | None, found: Rehearsal) -> list[tuple[Document, bytes]]:
    """Those that are kept, as they are kept, with the bytes whose hash tells their part."""
    if selection is None:
        return [(document, document.text.encode()) for document in documents]
    texts = [document.text for document in documents]
    verdicts = selection.judge(texts, _fates(texts, selection) if selection.needs_clusters else None)
    found.copies_too = selection.needs_clusters
    kept = []
    for document, verdict in zip(documents, verdicts, strict=True):
        if verdict.text is None:
            found.dropped[verdict.reason] += 1
            found.details.setdefault(verdict.reason, f"{document.name}: {verdict.detail}".removesuffix(": "))
        elif verdict.text == document.text:
            kept.append((document, verdict.mark))
        else:
            kept.append((replace(document, text=verdict.text, tokens=None), verdict.mark))
    return kept


def _fates(texts: Sequence[str], selection: Selection) -> Fates:
    """Of the sample by itself. The library for it works on files: these lie in a temporary folder."""
    from pretrain.data.selection.clusters import cluster
    from pretrain.data.selection.fates import Fates, fates_path, read_fates
    from pretrain.data.selection.signatures import SignatureWriter

    with tempfile.TemporaryDirectory(prefix="prepare-") as name:
        path = Path(name) / "signatures"
        with SignatureWriter(path, selection.fingerprint, selection.config.near) as writer:
            if texts:
                writer.add(selection.sign(texts))
        cluster({0: path}, Path(name), selection.config, selection.fingerprint)
        return Fates(read_fates(fates_path(Path(name), 0)).rows.copy())


def _count_tokens(documents: list[Document], parts: Iterable[str], tokenizer: Tokenizer, found: Rehearsal) -> None:
    started, left = time.process_time(), iter(parts)
    for batch in batches(documents):
        encoded = encode(tokenizer, batch)
        found.altered += encoded.altered
        for length in encoded.lengths:
            found.tokens[next(left)] += length
    found.seconds += time.process_time() - started


def lines_of(found: Rehearsal, options: Options, processes: int) -> Iterator[str]:
    """What to print. processes: that would do the work."""
    yield (
        f"Sample: {found.documents:,} documents, {found.read_bytes / 1e6:,.1f} of {found.bytes / 1e6:,.1f} MB in "
        f"{found.files:,} files. Nothing is written."
    )
    kept = sum(found.kept.values())
    yield f"  {kept:,} kept ({kept / max(found.documents, 1):.1%}): " + ", ".join(
        f"{found.kept[part]:,} {part}" for part in PARTS
    )
    for reason, count in found.dropped.most_common():
        yield f"  {count:,} not selected: {reason}, such as {found.details[reason]}"
    for reason, count in sorted(found.skipped.counts.items()):
        yield f"  {count:,} {reason}, such as {found.skipped.examples[reason][0]}"
    if found.altered:
        yield f"  {len(found.altered):,} do not decode to themselves, such as {found.altered[0]}"
    if not found.scale:
        yield "No file of the sample was read to its end, so nothing is known of the whole."
        return
    yield f"Expected of the whole, {found.scale:,.1f} times the sample:"
    size = dtype_of(found.vocab_size).itemsize
    for part in PARTS:
        tokens = round(found.tokens[part] * found.scale)
        if tokens > 1:
            chunks = num_chunks(tokens, options.tokens_per_chunk or chunk_size(tokens, options.rows.row))
            shards = -(-chunks // options.chunks_per_shard)
            plural = "" if shards == 1 else "s"
            yield f"  {part}: {tokens:,} tokens, {shards:,} shard{plural}, {tokens * size / 1e6:,.1f} MB"
    yield f"  {_clock(found.seconds * found.scale / processes)} with {processes} processes as fast as this one"
    if found.copies_too:
        yield "  Copies were looked for in the sample alone: the whole has more of them."
    if found.left_out:
        yield f"  {found.left_out:,} large compressed or foreign files are left out of this: only their beginning was read."


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
