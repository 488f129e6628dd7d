"""What a plan may add to reading, splitting and packing, and what stands there when it adds nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pretrain.data.documents import Document

Tokens = np.ndarray[Any, Any]


class Verdict(NamedTuple):
    """Of one document: its text as it is kept, or None and the reason why it is not."""

    text: str | None
    reason: str = ""


class Judge(Protocol):
    """Says of documents, one by one and by their text alone, whether they are kept. One for each piece."""

    def judge(self, documents: Sequence[Document]) -> Sequence[Verdict]: ...

    def report(self) -> dict[str, Any]:
        """What it saw and did, as JSON has it; reports of pieces are merged in the order of the pieces."""


class Packer(Protocol):
    """Makes rows of the documents of one piece and part."""

    def add(self, tokens: Tokens) -> Iterable[Tokens]:
        """Rows that are complete, now that one more document (its end included) has come."""

    def finish(self) -> Iterable[Tokens]:
        """The rows that are left."""


class Concatenated:
    """A packer that leaves documents as they are."""

    def add(self, tokens: Tokens) -> Iterator[Tokens]:
        yield tokens

    def finish(self) -> Iterator[Tokens]:
        yield from ()
