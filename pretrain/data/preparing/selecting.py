"""The documents of a piece that are kept, and the part of the split that each belongs to.

Without a selection these are all that can be read. With one (`pretrain/data/selection`) each is judged; where copies are looked
for too, three stages come first: every piece is signed by itself, one process finds the copies of all pieces together, and
what it says of a piece's documents lies in a file of fates that judging takes. Copies then fall on one side of the split.

    WORK/sign/000012.signatures    of the piece's documents, by `selection.signatures`
    WORK/clusters/                 of each piece the fates of its documents, and summary.json, written last
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pretrain.data.documents import Document, Skipped, read_documents
from pretrain.data.encode import batches
from pretrain.data.preparing.options import part_of
from pretrain.data.preparing.plan import Piece
from pretrain.data.preparing.tools import SIGN, Beat, Job, Tools

if TYPE_CHECKING:
    from pretrain.data.selection.select import Selection, Verdict
    from pretrain.data.selection.tally import Tally

CLUSTERS = "clusters"


class Kept(NamedTuple):
    """Documents that are kept, of each the bytes of its text and its part of the split. read: bytes of all that were read for
    them."""

    documents: list[Document]
    sizes: list[int]
    parts: list[str]
    read: int


def kept_of(tools: Tools, piece: Piece, skipped: Skipped, tally: Tally | None = None) -> Iterator[Kept]:
    """The piece's documents by batches. tally: counts what the plan's selection does with them."""
    if tools.selection is None:
        yield from (_all(tools, batch) for batch in batches(_read(tools, piece, skipped)))
    else:
        yield from _selected(tools, tools.selection, piece, skipped, tally)


def _read(tools: Tools, piece: Piece, skipped: Skipped) -> Iterator[Document]:
    options = tools.options
    return read_documents(
        piece.files, options.split, options.text_field, skipped, tools.known_tokenizer, options.eos_id
    )


def _all(tools: Tools, batch: list[Document]) -> Kept:
    texts = [document.text.encode() for document in batch]
    parts = [document.part or part_of(text, tools.options) for document, text in zip(batch, texts, strict=True)]
    sizes = [len(text) for text in texts]
    return Kept(batch, sizes, parts, sum(sizes))


def _selected(
    tools: Tools, selection: Selection, piece: Piece, skipped: Skipped, tally: Tally | None
) -> Iterator[Kept]:
    from pretrain.data.selection.fates import fates_path, read_fates

    fates = read_fates(fates_path(tools.work / CLUSTERS, piece.number)) if selection.needs_clusters else None
    place = 0
    for batch in batches(_read(tools, piece, skipped)):
        texts = [document.text for document in batch]
        verdicts = selection.judge(texts, None if fates is None else fates[place : place + len(batch)])
        place += len(batch)
        if tally is not None:
            tally.count([document.name for document in batch], texts, verdicts)
        pairs = [(one, verdict) for one, verdict in zip(batch, verdicts, strict=True) if verdict.text is not None]
        documents = [_changed(document, verdict) for document, verdict in pairs]
        parts = [document.part or part_of(verdict.mark, tools.options) for document, verdict in pairs]
        sizes = [len(document.text.encode()) for document in documents]
        yield Kept(documents, sizes, parts, sum(len(text.encode()) for text in texts))


def _changed(document: Document, verdict: Verdict) -> Document:
    """As it is kept. Tokens that it came with are no longer its own if its text was changed."""
    if verdict.text == document.text:
        return document
    assert verdict.text is not None
    return replace(document, text=verdict.text, tokens=None)


def signatures_path(work: Path, number: int) -> Path:
    return work / SIGN / f"{number:06d}.signatures"


def sign_piece(tools: Tools, number: int, beat: Beat) -> None:
    """Write what the copies of a piece's documents are found by."""
    from pretrain.data.selection.signatures import SignatureWriter

    piece, selection, skipped = tools.plan.piece(number), tools.selection, Skipped()
    assert selection is not None
    path = signatures_path(tools.work, number)
    with SignatureWriter(path, selection.fingerprint, selection.config.near) as writer:
        for batch in batches(_read(tools, piece, skipped)):
            texts = [document.text for document in batch]
            writer.add(selection.sign(texts))
            beat(sum(len(text.encode()) for text in texts), 0)
        piece.check()
    tools.finish(Job(SIGN, number), {"skipped": skipped.counts, "examples": skipped.examples})


def is_clustered(tools: Tools) -> bool:
    """Whether the copies of all pieces are found, or none are looked for."""
    from pretrain.data.selection.clusters import SUMMARY

    return not tools.plan.compares or (tools.work / CLUSTERS / SUMMARY).exists()


def find_copies(tools: Tools) -> None:
    """Say of every document of all pieces, which are signed, whether it is a copy, and of which."""
    from pretrain.data.selection.clusters import cluster

    selection = tools.selection
    assert selection is not None
    pieces = {number: signatures_path(tools.work, number) for number in range(tools.plan.pieces)}
    cluster(pieces, tools.work / CLUSTERS, selection.config, selection.fingerprint)


def write_selection_report(tools: Tools, folder: Path, tally: Tally) -> None:
    """The page that tells what was selected and why."""
    from pretrain.data.selection.clusters import read_summary
    from pretrain.data.selection.report import NAME, write_report

    selection = tools.selection
    assert selection is not None
    summary = read_summary(tools.work / CLUSTERS) if tools.plan.compares else None
    write_report(folder / NAME, selection, tally, summary)
