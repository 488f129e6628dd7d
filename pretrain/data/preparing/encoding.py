"""One piece to tokens: a file for each part of the split, whose tokens follow those of the piece before.

    WORK/encode/000012.train         tokens of the piece's training documents, document ends included
    WORK/encode/000012.validation
    WORK/encode/000012.json          the counts, written last

What is written depends on the piece alone, so two processes that do the same piece write the same.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from pretrain.data.documents import Skipped, read_documents
from pretrain.data.encode import batches, encode
from pretrain.data.preparing.files import write_whole
from pretrain.data.preparing.options import PARTS, Report, part_of
from pretrain.data.preparing.tools import ENCODE, Beat, Job, Tools


def tokens_path(work: Path, number: int, part: str) -> Path:
    return work / ENCODE / f"{number:06d}.{part}"


def encode_piece(tools: Tools, number: int, beat: Beat) -> None:
    """Encode one piece. Raises UserError if its files are not what the plan was made of."""
    piece, options, tokenizer = tools.plan.piece(number), tools.options, tools.tokenizer
    report = Report(tokenizer.vocab_size, tokenizer.sha256)
    skipped = Skipped(counts=report.skipped, examples=report.examples)
    documents = read_documents(piece.files, options.split, options.text_field, skipped, tokenizer, options.eos_id)
    packers = {part: tools.packer() for part in PARTS}
    with ExitStack() as files:
        outs: dict[str, IO[bytes]] = {
            part: files.enter_context(write_whole(tokens_path(tools.work, number, part))) for part in PARTS
        }
        for batch in batches(documents):
            encoded = encode(tokenizer, batch)
            report.add_altered(encoded.altered)
            size = 0
            for document, tokens in zip(batch, np.split(encoded.tokens, np.cumsum(encoded.lengths[:-1])), strict=True):
                data = document.text.encode()
                part = document.part or part_of(data, options)
                for rows in packers[part].add(tokens):
                    outs[part].write(rows.data)
                    report.parts[part].tokens += len(rows)
                report.parts[part].documents += 1
                report.parts[part].text_bytes += len(data)
                size += len(data)
            beat(size, len(encoded.tokens))
        for part, packer in packers.items():
            for rows in packer.finish():
                outs[part].write(rows.data)
                report.parts[part].tokens += len(rows)
            report.parts[part].padding = packer.padding
        piece.check()
    tools.finish(Job(ENCODE, number), asdict(report))
