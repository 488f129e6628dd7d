"""Documents whose token ids are given: cut at document ends, checked against the tokenizer that made them.

Each becomes a Document that has its ids and the text that they decode to, so that what goes by the text (the split into
training and validation, duplicates, bytes per token) is the same as for text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pretrain.data.documents import Document, Skipped
from pretrain.data.shards import dtype_of
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer

MAX_TOKENS = 1 << 22  # of a document: decoding takes some 50 bytes each
WITHOUT_TOKENIZER = "tokens, which are read where --tokenizer names their tokenizer"


def token_documents(
    name: str, ids: np.ndarray[Any, Any], tokenizer: Tokenizer, skipped: Skipped, end: int | None = None
) -> Iterator[Document]:
    """Documents of ids (P,) of any integer type. end: an id that ends a document, beside the tokenizer's own; neither is kept.
    Several documents are numbered from 1. Raises UserError for an id that the tokenizer does not have."""
    last = (ids == tokenizer.eos) if end is None else (ids == tokenizer.eos) | (ids == end)
    ends = np.flatnonzero(last)
    starts, stops = [0, *(ends + 1).tolist()], [*ends.tolist(), len(ids)]
    several = len(starts) - (starts[-1] == len(ids)) > 1
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True), 1):
        if start < stop:
            yield from _document(f"{name}#{number}" if several else name, ids[start:stop], tokenizer, skipped)


def _document(name: str, ids: np.ndarray[Any, Any], tokenizer: Tokenizer, skipped: Skipped) -> Iterator[Document]:
    if len(ids) > MAX_TOKENS:
        return skipped.add(name, f"a document of more than {MAX_TOKENS:,} tokens")
    _check_ids(name, ids, tokenizer)
    text = tokenizer.decode(ids.tolist())
    if not text.strip():
        return skipped.add(name, "empty")
    yield Document(name, text, ids.astype(dtype_of(tokenizer.vocab_size)))


def _check_ids(name: str, ids: np.ndarray[Any, Any], tokenizer: Tokenizer) -> None:
    found = int(ids.min()), int(ids.max())
    if found[0] < 0 or found[1] >= tokenizer.vocab_size:
        raise UserError(
            f"{name} holds the id {found[found[0] >= 0]}, and the tokenizer's ids are 0 to {tokenizer.vocab_size - 1}: name "
            "by --tokenizer the one that these tokens were made with."
        )
