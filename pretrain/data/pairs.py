"""`python -m pretrain prepare --pairs`: pairs of a source and a target to shards of packed rows.

A row is `source_length` tokens of sources and `target_length` tokens of targets: pair n of either side ends with that
side's n-th document end, and what is left of a side is filled with document ends. Pairs stay in the order of the file; a
row is closed when the next pair does not fit. So a sample of training is a row, and its order, layouts and shapes are as
for text. A pair that fits no row is left out and counted.
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
from pretrain.data.prepare import CONTENTS, finish, tokenizer_of
from pretrain.data.preparing.options import PARTS, Options, Report, check_split, part_of
from pretrain.data.progress import Progress, total_of
from pretrain.data.shards import ShardWriter, dtype_of
from pretrain.errors import UserError
from pretrain.tasks.pairs import Pair, read_aligned, read_pairs
from pretrain.tokenization.base import Tokenizer

SOURCE_LENGTH = TARGET_LENGTH = 128
TOO_LONG = "pairs longer than a row"

Tokens = np.ndarray[Any, Any]


class Lengths(NamedTuple):
    """Tokens of a row's two sides."""

    source: int
    target: int


class Row:
    """A row that is being filled."""

    def __init__(self, lengths: Lengths, eos: int, dtype: np.dtype[Any]) -> None:
        self.lengths, self.eos, self.dtype = lengths, eos, dtype
        self.sides: tuple[list[Tokens], list[Tokens]] = ([], [])
        self.used = [0, 0]

    def fits(self, pair: tuple[Tokens, Tokens]) -> bool:
        """pair: tokens of both sides, each with its end."""
        return all(used + len(side) <= length for used, side, length in zip(self.used, pair, self.lengths, strict=True))

    def add(self, pair: tuple[Tokens, Tokens]) -> None:
        for number, side in enumerate(pair):
            self.sides[number].append(side)
            self.used[number] += len(side)

    def take(self) -> Tokens:
        """The row (source + target,), after which it is empty; one without a pair is (0,)."""
        parts = []
        if self.used[0]:
            for side, used, length in zip(self.sides, self.used, self.lengths, strict=True):
                parts += [*side, np.full(length - used, self.eos, self.dtype)]
        self.__init__(self.lengths, self.eos, self.dtype)  # type: ignore[misc]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)


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
    rows = {name: Row(lengths, tokenizer.eos, dtype) for name in PARTS}
    encoder = Encoder(tokenizer, processes)
    try:
        with Progress(total_of([TextFile(Path(file), str(file)) for file in files]), say) as progress:
            for pair, tokens in _encoded(encoder, _read(files), str(files[0]), report):
                text = _whole(pair)
                name = part_of(text, options)
                if any(len(side) > length for side, length in zip(tokens, lengths, strict=True)):
                    skipped.add(f"{files[0]}:{pair.line}", TOO_LONG)
                    continue
                if not rows[name].fits(tokens):
                    writers[name].add(rows[name].take())
                rows[name].add(tokens)
                report.parts[name].documents += 1
                report.parts[name].text_bytes += len(text) - 1
                progress.add(sum(map(len, tokens)), len(text))
    finally:
        encoder.close()
    check_split({name: part.documents for name, part in report.parts.items()}, skipped, options)
    for name, part in report.parts.items():
        if part.documents:
            # One end more, for a chunk has a look-ahead, which the last row needs as the others.
            writers[name].add(np.append(rows[name].take(), np.array(tokenizer.eos, dtype)))
            part.tokens = writers[name].tokens
    finish(draft, report, tokenizer, writers, lengths)
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
