"""One piece to tokens: a file for each part of the split, whose tokens follow those of the piece before.

    WORK/encode/000012.train         tokens of the piece's training documents, document ends included
    WORK/encode/000012.validation
    WORK/encode/000012.json          the counts, written last

What is written depends on the piece alone, so two processes that do the same piece write the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from pretrain.data.documents import Skipped
from pretrain.data.encode import encode
from pretrain.data.packing import Packer
from pretrain.data.preparing.files import write_whole
from pretrain.data.preparing.options import PARTS, Part, Report
from pretrain.data.preparing.selecting import kept_of
from pretrain.data.preparing.tools import ENCODE, Beat, Job, Tools


def tokens_path(work: Path, number: int, part: str) -> Path:
    return work / ENCODE / f"{number:06d}.{part}"


def encode_piece(tools: Tools, number: int, beat: Beat) -> None:
    """Encode one piece. Raises UserError if its files are not what the plan was made of."""
    piece, tokenizer = tools.plan.piece(number), tools.tokenizer
    report, tally = Report(tokenizer.vocab_size, tokenizer.sha256), tools.new_tally()
    skipped = Skipped(counts=report.skipped, examples=report.examples)
    with ExitStack() as files:
        outs = {
            part: _Out(
                files.enter_context(write_whole(tokens_path(tools.work, number, part))),
                tools.packer(),
                report.parts[part],
            )
            for part in PARTS
        }
        for kept in kept_of(tools, piece, skipped, tally):
            encoded = encode(tokenizer, kept.documents)
            report.add_altered(encoded.altered)
            starts = np.cumsum([0, *encoded.lengths]).tolist()
            for place, (part, size) in enumerate(zip(kept.parts, kept.sizes, strict=True)):
                outs[part].add(encoded.tokens[starts[place] : starts[place + 1]], size)
            beat(kept.read, len(encoded.tokens))
        for out in outs.values():
            out.finish()
        piece.check()
    tools.finish(Job(ENCODE, number), {**asdict(report), "tally": None if tally is None else tally.to_json()})


@dataclass
class _Out:
    """A part's file of one piece."""

    file: IO[bytes]
    packer: Packer
    counts: Part

    def add(self, tokens: np.ndarray[Any, Any], size: int) -> None:
        """One document's tokens; size: bytes of its text."""
        self.counts.documents += 1
        self.counts.text_bytes += size
        self._write(self.packer.add(tokens))

    def finish(self) -> None:
        self._write(self.packer.finish())
        self.counts.padding = self.packer.padding

    def _write(self, rows: Iterable[np.ndarray[Any, Any]]) -> None:
        for some in rows:
            self.file.write(some.data)
            self.counts.tokens += len(some)
