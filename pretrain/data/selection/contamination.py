"""Evaluation texts in the corpus: a run of so many words of an evaluation file makes a document contaminated (Brown et al. 2020,
appendix C: 13 words, in lower case, without punctuation).

Texts of fewer words have no such run and find nothing; how many there are is told. The runs are kept as 64-bit keys, 8 bytes a
word of the evaluation files.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data import compressed
from pretrain.data.order import Words
from pretrain.data.selection.config import Contamination
from pretrain.data.selection.phrases import among
from pretrain.data.selection.rules import Array
from pretrain.data.selection.words import Texts, WordRuns
from pretrain.errors import UserError

MAX_BYTES = 1 << 30  # of an evaluation file
MAX_LINE = 64 << 20
GROUP = 1 << 20  # characters that are made words of at once
TABLES = {".tsv": "\t", ".csv": ","}


class Found(NamedTuple):
    """A run of an evaluation file in a document: the file, and the words as they stand in the document."""

    file: str
    words: str


class Runs:
    """The runs of all files: sorted keys, and which file each is of (the first that has it)."""

    def __init__(self, config: Contamination) -> None:
        self.size, self.files = config.words, config.files
        keys, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
        self.num_texts = self.num_short = 0
        for number, name in enumerate(config.files):
            for found in self._of(Path(name)):
                keys.append(found)
                owners.append(np.full(len(found), number, np.int32))
        self.keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._owners = np.concatenate(owners)[first]
        if not len(self.keys):
            raise UserError(
                f"contamination.files: none of their {self.num_texts} texts has {self.size} words; lower contamination.words."
            )

    def _of(self, path: Path) -> Iterator[Words]:
        for batch in _grouped(texts_of(path)):
            runs = Texts([_normal(text) for text in batch]).bare
            self.num_texts += len(batch)
            self.num_short += int((np.diff(runs.offsets) < self.size).sum())
            yield np.unique(runs.run_keys(self.size)[1])

    def find(self, text: str) -> Found | None:
        """The first run in the text, if there is one. Memory is bounded: a long text is looked at piece by piece."""
        for piece in pieces(_normal(text), self.size):
            texts = Texts([piece])
            first, keys = texts.bare.run_keys(self.size)
            if len(keys) and (hits := np.flatnonzero(among(keys, self.keys))).size:
                return self._found(piece, texts.bare, int(first[hits[0]]), keys[hits[0]])
        return None

    def _found(self, text: str, words: WordRuns, first: int, key: Any) -> Found:
        owner: Array = self._owners[np.searchsorted(self.keys, key)]
        start, end = int(words.starts[first]) - 1, int(words.ends[first + self.size - 1]) - 1
        return Found(self.files[int(owner)], text[start:end])


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of about GROUP characters that overlap, so that each run of `size` words is whole in one of them."""
    overlap = 64 * size  # characters; a run longer than that is cut, if it lies across an edge
    for start in range(0, max(len(text) - overlap, 1), GROUP):
        yield text[start : start + GROUP + overlap]


def texts_of(path: Path) -> Iterator[str]:
    """The texts of an evaluation file: every string of a .jsonl line's value, every cell of a table, or the whole file.
    Raises UserError where it cannot be read."""
    suffix = (Path(path.stem) if path.suffix.lower() in compressed.SUFFIXES else path).suffix.lower()
    try:
        with compressed.open_bytes(path) as stream:
            if suffix in (".jsonl", ".ndjson"):
                yield from _json_lines(path, stream)
                return
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: an evaluation file of more than {MAX_BYTES >> 30} GiB; cut it into several.")
        text = data.decode("utf-8")
        yield from _cells(text, TABLES[suffix]) if suffix in TABLES else [text]
    except (OSError, UnicodeDecodeError, csv.Error, *compressed.DAMAGED) as error:
        raise UserError(f"{path}: cannot be read as an evaluation file: {error}") from None


def _cells(text: str, delimiter: str) -> Iterator[str]:
    """Tab-separated tables have no quotes."""
    if delimiter == "\t":
        yield from (cell for line in text.splitlines() for cell in line.split("\t"))
        return
    for row in csv.reader(io.StringIO(text), delimiter=delimiter):
        yield from row


def _json_lines(path: Path, stream: Any) -> Iterator[str]:
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise UserError(f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB")
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}:{number}: not JSON; an evaluation file has one value a line.") from None
        yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, but for keys."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one


def _grouped(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= GROUP:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
