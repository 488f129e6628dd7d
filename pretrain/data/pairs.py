"""`python -m pretrain prepare --pairs`: pairs of a source and a target to shards of packed rows.

A row is `source_length` tokens of sources and `target_length` tokens of targets: pair n of either side ends with that
side's n-th document end, and what is left of a side is filled with document ends. So a sample of training is a row, and its
order, layouts and shapes are as for text. A pair that fits no row is left out and counted.

Rows are filled by best fit inside blocks of BLOCK pairs (`fit-pairs S T` in the manifest). Up to its version 3 (`pairs S T`)
pairs kept the order of the file and a row was closed when the next one did not fit: of rows of 128 and 128 tokens that left
22% empty where 2% is now (docs/log.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.documents import Document, Skipped, TextFile
from pretrain.data.encode import Encoder
from pretrain.data.folder import whole_folder
from pretrain.data.packing import Packing, places_of
from pretrain.data.prepare import CONTENTS, end_rows, finish, tokenizer_of
from pretrain.data.preparing.options import PARTS, Options, Report, check_split, part_of, wrong_chunk
from pretrain.data.progress import Progress, total_of
from pretrain.data.shards import ShardWriter, dtype_of
from pretrain.errors import UserError
from pretrain.tasks.pairs import Pair, read_aligned, read_pairs
from pretrain.tokenization.base import Tokenizer

SOURCE_LENGTH = TARGET_LENGTH = 128
BLOCK = 1 << 13  # pairs
TOO_LONG = "pairs longer than a row"

Tokens = np.ndarray[Any, Any]
Integers = np.ndarray[Any, np.dtype[np.int64]]


class Lengths(NamedTuple):
    """Tokens of a row's two sides."""

    source: int
    target: int


class PairPacker:
    """Makes rows of pairs; `padding`: places of the rows so far that filler takes."""

    def __init__(self, lengths: Lengths, eos: int, dtype: np.dtype[Any]) -> None:
        self.lengths, self.eos, self.dtype = lengths, eos, dtype
        self.padding = 0
        self._pairs: list[tuple[Tokens, Tokens]] = []

    def add(self, pair: tuple[Tokens, Tokens]) -> Iterator[Tokens]:
        """pair: tokens of both sides, each with its end, that fit a row. Gives whole rows, one behind the other."""
        # Copies, since the tokens of a pair are views of those of many, which would all be kept.
        self._pairs.append((np.array(pair[0], self.dtype), np.array(pair[1], self.dtype)))
        if len(self._pairs) == BLOCK:
            yield from self.finish()

    def finish(self) -> Iterator[Tokens]:
        """What is left, likewise."""
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return
        sizes = np.array([(len(source), len(target)) for source, target in pairs], np.int64)
        numbers = best_fit(sizes, self.lengths)
        places = [places_of(size, numbers, length) for size, length in zip(sizes.T, self.lengths, strict=True)]
        count = places[0][1]
        rows = np.full((count, sum(self.lengths)), self.eos, self.dtype)
        sides = rows[:, : self.lengths.source], rows[:, self.lengths.source :]
        for side, (starts, _), length, number in zip(sides, places, self.lengths, (0, 1), strict=True):
            for pair, start in zip(pairs, starts.tolist(), strict=True):
                row, first = divmod(start, length)
                side[row, first : first + len(pair[number])] = pair[number]
        self.padding += rows.size - int(sizes.sum())
        yield rows.reshape(-1)


def best_fit(sizes: Integers, lengths: Lengths) -> Integers:
    """Numbers (n,) of the rows of pairs of these sizes (n, 2). From the pair on that takes the largest part of a side (of
    like ones the first) each goes into the row of least room that has room for it, or else into a new one."""
    weights = np.array([lengths.target, lengths.source], np.int64)  # both sides of a row count the same
    room = np.empty((len(sizes), 2), np.int64)
    numbers, made = np.empty(len(sizes), np.int64), 0
    for pair in np.argsort(-(sizes * weights).max(axis=1), kind="stable").tolist():
        fits = np.flatnonzero((room[:made] >= sizes[pair]).all(axis=1))
        if len(fits):
            row = int(fits[(room[fits] @ weights).argmin()])
        else:
            row, made = made, made + 1
            room[row] = lengths
        room[row] -= sizes[pair]
        numbers[pair] = row
    return numbers


def prepare_pairs(
    files: Sequence[str | Path],
    out: str | Path,
    lengths: Lengths,
    options: Options | None = None,
    processes: int = 1,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Prepare the pairs of a table or of two files aligned by lines into `out`. The other arguments, and what is raised:
    as of `pretrain.data.prepare.prepare`."""
    options = options or Options()
    options.check()
    if not 1 <= len(files) <= 2:
        raise UserError("--pairs takes one table of two columns, or two files whose lines belong together.")
    if min(lengths) < 2:
        raise UserError("--source-length and --target-length must be at least 2: a token and its end.")
    if wrong := wrong_chunk(options.tokens_per_chunk, sum(lengths)):
        raise UserError(wrong)
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    with whole_folder(out, CONTENTS, say) as draft:

        def texts(skipped: Skipped) -> Iterator[tuple[bytes, str]]:
            for pair in _read(files):
                for text in _sides(pair):
                    yield _whole(pair), text

        tokenizer = tokenizer_of(texts, options, say)
        return _write(draft, files, lengths, tokenizer, options, processes, say)


def _read(files: Sequence[str | Path]) -> Iterator[Pair]:
    return read_pairs(files[0]) if len(files) == 1 else read_aligned(*files)


def _sides(pair: Pair) -> tuple[str, str]:
    assert pair.target is not None
    return pair.source, pair.target


def _whole(pair: Pair) -> bytes:
    """By whose hash a pair falls to training or validation."""
    return "\t".join(_sides(pair)).encode()


def _write(
    draft: Path,
    files: Sequence[str | Path],
    lengths: Lengths,
    tokenizer: Tokenizer,
    options: Options,
    processes: int,
    say: Callable[[str], None],
) -> Report:
    report = Report(tokenizer.vocab_size, tokenizer.sha256)
    skipped = Skipped(options.strict, report.skipped, report.examples)
    dtype, width = dtype_of(tokenizer.vocab_size), sum(lengths)
    writers = {
        name: ShardWriter(draft / name, dtype, options.tokens_per_chunk, options.chunks_per_shard, width)
        for name in PARTS
    }
    packers = {name: PairPacker(lengths, tokenizer.eos, dtype) for name in PARTS}
    encoder = Encoder(tokenizer, processes)
    try:
        with Progress(total_of([TextFile(Path(file), str(file)) for file in files]), say) as progress:
            for pair, tokens in _encoded(encoder, _read(files), str(files[0]), report):
                text = _whole(pair)
                name = part_of(text, options)
                if any(len(side) > length for side, length in zip(tokens, lengths, strict=True)):
                    skipped.add(f"{files[0]}:{pair.line}", TOO_LONG)
                    continue
                for rows in packers[name].add(tokens):
                    writers[name].add(rows)
                report.parts[name].documents += 1
                report.parts[name].text_bytes += len(text) - 1
                progress.add(sum(map(len, tokens)), len(text))
    finally:
        encoder.close()
    check_split({name: part.documents for name, part in report.parts.items()}, skipped, options)
    for name, part in report.parts.items():
        for rows in packers[name].finish():
            writers[name].add(rows)
        if part.documents:
            end_rows(writers[name], tokenizer.eos, part, packers[name].padding)
    finish(draft, report, tokenizer, writers, Packing("fit-pairs", tuple(lengths)))
    return report


def _encoded(
    encoder: Encoder, pairs: Iterable[Pair], name: str, report: Report
) -> Iterator[tuple[Pair, tuple[Tokens, Tokens]]]:
    """Each pair with the tokens of its sides, each ended; they travel to the encoder as two documents."""
    waiting: list[Pair] = []

    def documents() -> Iterator[Document]:
        for pair in pairs:
            waiting.append(pair)
            for side in _sides(pair):
                yield Document(f"{name}:{pair.line}", side)

    sides: list[Tokens] = []
    for _, encoded in encoder(documents()):
        report.add_altered(encoded.altered)
        sides += np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])
        whole = len(sides) // 2
        for pair, source, target in zip(
            waiting[:whole], sides[0 : 2 * whole : 2], sides[1 : 2 * whole : 2], strict=True
        ):
            yield pair, (source, target)
        del waiting[:whole], sides[: 2 * whole]
