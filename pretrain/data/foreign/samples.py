"""webdataset shards made elsewhere: samples of members that share a name, each a document or a few.

A sample's documents are its .txt, .text and .md members; without these the lines of its .jsonl, without these the text field
of its .json, and without any of these the token ids of its .npy (one row of whole numbers), .tok or .bin (bare little-endian
numbers of two bytes, or four for a vocabulary above 65,536). Tokens are only read where the tokenizer is named. Samples are
grouped by webdataset itself; its openers and decoders, which would run commands and unpickle, have no part in it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from pretrain.data.documents import Document, Reading, Skipped, TextFile, json_document, json_lines, text_document
from pretrain.data.foreign import arrays
from pretrain.data.foreign.tars import PREFIX, CleanTar
from pretrain.data.foreign.tokens import WITHOUT_TOKENIZER, token_documents
from pretrain.data.shards import dtype_of

TEXT, LINES, OBJECT, TOKENS = ("txt", "text", "md"), ("jsonl", "ndjson"), ("json",), ("npy", "tok", "bin")
KINDS = (TEXT, LINES, OBJECT, TOKENS)  # the first that a sample has is what it is read by
WEBDATASETS_OWN = ("__key__", "__url__")  # what a sample holds beside its members
WANTED = frozenset(suffix for kind in KINDS for suffix in kind)


def read_webdataset(file: TextFile, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    """Documents of a tar, in its order, named FILE:MEMBER. Memory is bounded by one sample's members."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # imports torch: seconds

    clean = CleanTar(file.path, file.name, WANTED, skipped)
    try:
        shard = {"url": file.name, "stream": clean}
        members = tar_file_expander([shard], rename_files=lambda name: name.removeprefix(PREFIX))
        for sample in group_by_keys(members):
            clean.check()
            yield from _documents(file.name, sample, reading, skipped)
        clean.check()
    finally:
        clean.close()


def _documents(name: str, sample: dict[str, Any], reading: Reading, skipped: Skipped) -> Iterator[Document]:
    members = {suffix: data for suffix, data in sample.items() if suffix not in WEBDATASETS_OWN}
    last = {suffix: suffix.rpartition(".")[2] for suffix in members}
    kind = next(kind for kind in KINDS if set(kind) & set(last.values()))
    for suffix, data in members.items():
        if last[suffix] in kind:
            where = f"{name}:{sample['__key__']}.{suffix}"
            yield from _member(where, last[suffix], data, reading, skipped)


def _member(where: str, kind: str, data: bytes, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    if kind in TEXT:
        yield from text_document(where, data, skipped)
    elif kind in LINES:
        yield from json_lines(where, io.BytesIO(data), reading.text_field, skipped)
    elif kind in OBJECT:
        yield from json_document(where, data, reading.text_field, skipped)
    elif reading.tokenizer is None:
        skipped.add(where, WITHOUT_TOKENIZER)
    else:
        ids = arrays.npy(data) if kind == "npy" else arrays.bare(data, dtype_of(reading.tokenizer.vocab_size))
        if isinstance(ids, str):
            return skipped.add(where, ids)
        yield from token_documents(where, ids, reading.tokenizer, skipped, reading.eos_id)
