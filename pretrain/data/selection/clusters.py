"""Which documents of a corpus are copies, of all pieces together, with bounded memory.

A document's number is its place in the corpus: pieces by their numbers, documents in their order. Whatever order files are named
in, the same documents are the same clusters, and a cluster's first document, the smallest number, stands for it.

  exact   hashes are sorted (`sorting.py`); of equal ones the first is kept
  near    of those that are left and no rule drops, each band's keys are sorted. Documents with the same key are compared by
          their whole signatures with the first of them; those that are no copies of it with the first of these, and so on,
          LEADERS times: a band that a million documents share by chance costs no million squared. Documents that are copies
          become one cluster, by union of trees whose root is the smallest number.

One array of 8 bytes a document, in a file that is mapped, holds the trees; the rest is read and written in blocks. In a band,
what earlier bands have joined is not compared again; what it finds itself is joined at its end. So neither memory nor
the cut into blocks decides anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.order import Integers
from pretrain.data.selection.config import SelectionConfig
from pretrain.data.selection.fates import Fates, fates_path, write_fates
from pretrain.data.selection.reasons import EXACT, NEAR
from pretrain.data.selection.rules import Array
from pretrain.data.selection.signatures import SignatureFile
from pretrain.data.selection.sorting import Records, Sorter, write_whole

MEMORY = 256 << 20
LEADERS = 8  # documents of one band key that others are compared with
SUMMARY = "summary.json"


@dataclass
class Summary:
    """documents: of all pieces. exact, near: copies found (near also where they are kept). sizes: documents a cluster ->
    clusters of so many, from 2 on. histograms: as in `Signatures`, of all pieces."""

    documents: int
    exact: int
    near: int
    sizes: dict[int, int]
    histograms: list[list[int]]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "sizes": {str(size): count for size, count in sorted(self.sizes.items())}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Summary:
        return cls(**{**values, "sizes": {int(size): count for size, count in values["sizes"].items()}})


def cluster(
    pieces: Mapping[int, Path], out: Path, config: SelectionConfig, fingerprint: str, memory: int = MEMORY
) -> Summary:
    """Of the signature files of all pieces, by their numbers: writes a file of fates for each piece into `out`, then
    `summary.json`. memory: bytes, about, beside the mapped file. Raises UserError for files that are not this selection's."""
    out.mkdir(parents=True, exist_ok=True)
    (out / SUMMARY).unlink(missing_ok=True)  # an earlier one's, which a run that ends here must not leave behind
    scratch = out / ".sorting"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        corpus = Corpus(
            {number: SignatureFile(pieces[number], fingerprint) for number in sorted(pieces)}, scratch, memory
        )
        exact = _join_exact(corpus) if config.exact is not None else 0
        if config.near is not None:
            for band in range(config.near.bands):
                _join_band(corpus, band, config.near.threshold)
        drop = config.near is not None and config.near.drop
        summary = _finish(corpus, out, drop, exact)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_whole(out / SUMMARY, json.dumps(summary.to_json(), sort_keys=True).encode() + b"\n")
    return summary


def read_summary(out: Path) -> Summary | None:
    """What `cluster` wrote last; None where it has not ended."""
    path = out / SUMMARY
    return Summary.from_json(json.loads(path.read_text())) if path.is_file() else None


class Corpus:
    """All pieces' documents under one numbering. parents (N,): a document of the same cluster with a smaller number, or itself;
    reasons (N,): why it is dropped so far."""

    def __init__(self, files: dict[int, SignatureFile], scratch: Path, memory: int) -> None:
        self.files, self.scratch, self.memory = files, scratch, memory
        self.bases = np.cumsum([0, *(file.documents for file in files.values())])
        self.documents = int(self.bases[-1])
        self.parents = self.mapped("parents", np.int64)
        self.reasons = self.mapped("reasons", np.uint8)
        for first, last in self.slices():
            self.parents[first:last] = np.arange(first, last)
        for base, file in self.each():
            place = base
            for reasons, _ in file.dropped():
                self.reasons[place : place + len(reasons)] = reasons
                place += len(reasons)

    def mapped(self, name: str, dtype: type) -> Array:
        """(N,) zeros in a file, which the system keeps in memory as far as there is room."""
        if not self.documents:
            return np.zeros(0, dtype)
        return np.memmap(self.scratch / name, dtype, "w+", shape=(self.documents,))

    def each(self) -> Iterator[tuple[int, SignatureFile]]:
        """The files, each with its first document's number."""
        return zip(self.bases[:-1].tolist(), self.files.values(), strict=True)

    def slices(self) -> Iterator[tuple[int, int]]:
        """All documents by ranges of numbers."""
        step = max(self.memory // 64, 1024)
        return ((first, min(first + step, self.documents)) for first in range(0, self.documents, step))

    def sorter(self, columns: int) -> Sorter:
        return Sorter(self.scratch, columns, self.memory)

    def roots(self, documents: Integers) -> Integers:
        """The smallest number of each one's cluster."""
        found: Integers = np.asarray(self.parents[documents])
        while True:
            above = self.parents[found]
            if np.array_equal(above, found):
                return found
            found = np.asarray(above)

    def join(self, one: Integers, other: Integers) -> None:
        """Each pair's clusters become one, under the smallest number."""
        while len(one):
            a, b = self.roots(one), self.roots(other)
            apart = a != b
            one, other = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
            np.minimum.at(self.parents, other, one)

    def gather(self, documents: Integers, read: str) -> Array:
        """Rows of documents, from their files: read is `exact_of` or `sketches_of`."""
        wanted, back = np.unique(documents, return_inverse=True)
        edges = np.searchsorted(wanted, self.bases)
        parts = [
            getattr(file, read)((wanted[first:last] - base).tolist())
            for (base, file), first, last in zip(self.each(), edges, edges[1:], strict=False)
            if last > first
        ]
        found: Array = np.concatenate(parts)[back]
        return found


def _join_exact(corpus: Corpus) -> int:
    """Copies get the reason and the first of them as parent; their number."""
    sorter = corpus.sorter(3)
    for base, file in corpus.each():
        place = base
        for hashes in file.exact():
            numbers = np.arange(place, place + len(hashes), dtype=np.uint64)
            sorter.add(np.column_stack([hashes, numbers]))
            place += len(hashes)
    count, before = 0, np.zeros((0, 3), np.uint64)
    for block in sorter.blocks():
        rows = np.concatenate([before, block])
        new = np.append(True, (rows[1:, :2] != rows[:-1, :2]).any(axis=1))
        numbers = rows[:, 2].astype(np.int64)
        first = numbers[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
        copies = numbers[~new]
        corpus.parents[copies] = first[~new]
        corpus.reasons[copies] = EXACT
        count += len(copies)
        before = rows[np.flatnonzero(new)[-1:]]  # the last hash's first document: its copies may go on
    return count


def _join_band(corpus: Corpus, band: int, threshold: float) -> None:
    sorter = corpus.sorter(2)
    for base, file in corpus.each():
        place = base
        for keys in file.band(band):
            taking_part = np.flatnonzero(corpus.reasons[place : place + len(keys)] == 0)
            sorter.add(np.column_stack([keys[taking_part], (place + taking_part).astype(np.uint64)]))
            place += len(keys)
    pairs = corpus.scratch / "pairs"
    with open(pairs, "wb") as stream:
        leaders = np.zeros((0, 2), np.uint64)
        for block in sorter.blocks():
            found, leaders = _copies(corpus, np.concatenate([leaders, block]), threshold)
            found.tofile(stream)
    size = max(corpus.memory // 128, 1024)
    for first in range(0, pairs.stat().st_size // 16, size):
        found = np.fromfile(pairs, np.int64, 2 * size, offset=16 * first).reshape(-1, 2)
        corpus.join(found[:, 0], found[:, 1])


def _copies(corpus: Corpus, rows: Records, threshold: float) -> tuple[Integers, Records]:
    """Pairs (n, 2) of copies among documents of the same key, of rows sorted by key and number; and the leaders of the last
    key, since its documents may go on in the next block."""
    pairs, last, leaders = [np.zeros((0, 2), np.int64)], rows[-1, 0] if len(rows) else None, []
    for _ in range(LEADERS):
        if not len(rows):
            break
        new = np.append(True, rows[1:, 0] != rows[:-1, 0])
        if rows[-1, 0] == last:
            leaders.append(rows[np.flatnonzero(new)[-1:]])
        leader = np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))
        others = np.flatnonzero(~new)
        found = rows[:, 1].astype(np.int64)
        pair = np.column_stack([found[leader[others]], found[others]])
        same = _are_copies(corpus, pair, threshold)
        pairs.append(pair[same])
        rows = rows[others[~same]]
    return np.concatenate(pairs), np.concatenate([*leaders, np.zeros((0, 2), np.uint64)])


def _are_copies(corpus: Corpus, pairs: Integers, threshold: float) -> Array:
    """(n,) bool: joined by an earlier band, or signatures that agree in enough places."""
    same = corpus.roots(pairs[:, 0]) == corpus.roots(pairs[:, 1])
    open_ = np.flatnonzero(~same)
    permutations = next(iter(corpus.files.values())).permutations if corpus.files else 1
    step = max(corpus.memory // (16 * permutations), 256)
    for first in range(0, len(open_), step):
        part = open_[first : first + step]
        one, other = (corpus.gather(pairs[part, side], "sketches_of") for side in (0, 1))
        same[part] = (one == other).mean(axis=1) >= threshold
    return same


def _finish(corpus: Corpus, out: Path, drop: bool, exact: int) -> Summary:
    """Write what becomes of each document, and count the clusters."""
    sizes = corpus.mapped("sizes", np.uint32)
    near = 0
    for first, last in corpus.slices():
        roots = corpus.roots(np.arange(first, last))
        corpus.parents[first:last] = roots
        copies = (roots != np.arange(first, last)) & (corpus.reasons[first:last] == 0)
        near += int(copies.sum())
        if drop:
            corpus.reasons[first:last][copies] = NEAR
        np.add.at(sizes, roots, 1)
    for number, (base, file) in zip(corpus.files, corpus.each(), strict=True):
        write_fates(fates_path(out, number), _fates(corpus, sizes, base, file))
    return Summary(corpus.documents, exact, near, _counted(corpus, sizes), _added(corpus))


def _fates(corpus: Corpus, sizes: Array, base: int, file: SignatureFile) -> Iterator[Fates]:
    place = base
    for hashes, (_, values) in zip(file.exact(), file.dropped(), strict=True):
        here = slice(place, place + len(hashes))
        roots, marks = np.asarray(corpus.parents[here]), hashes.copy()
        elsewhere = np.flatnonzero(roots != np.arange(here.start, here.stop))
        if len(elsewhere):
            marks[elsewhere] = corpus.gather(roots[elsewhere], "exact_of")
        piece = np.searchsorted(corpus.bases, roots, "right") - 1
        fates = np.zeros(len(hashes), Fates.DTYPE)
        fates["reason"], fates["value"], fates["mark"] = corpus.reasons[here], values, marks
        fates["piece"], fates["place"] = np.array(list(corpus.files))[piece], roots - corpus.bases[piece]
        fates["size"] = np.where(roots == np.arange(here.start, here.stop), sizes[roots], 1)
        yield Fates(fates)
        place += len(hashes)


def _counted(corpus: Corpus, sizes: Array) -> dict[int, int]:
    counts: dict[int, int] = {}
    for first, last in corpus.slices():
        found, times = np.unique(sizes[first:last], return_counts=True)
        for size, time in zip(found.tolist(), times.tolist(), strict=True):
            if size > 1:
                counts[size] = counts.get(size, 0) + time
    return counts


def _added(corpus: Corpus) -> list[list[int]]:
    """The pieces' histograms as one."""
    found = [np.array(file.histograms, np.int64) for _, file in corpus.each() if file.histograms]
    total: list[list[int]] = sum(found).tolist() if found else []  # type: ignore[union-attr]
    return total
