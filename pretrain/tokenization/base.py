"""What a tokenizer is to the rest of the program, whichever library computes it.

A tokenizer is its file: `content` lies under the name `file` beside the shards and in a run's folder, and opens again to the
same tokenizer (`pretrain.tokenization.foreign`). Nothing in it is executed.

No text can produce a control id, so a document's end stays where `prepare` put it, and a masked position is one that the
objective masked. Text that spells a control symbol ("[MASK]", "</s>") is encoded as any other text.
"""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

MAX_BYTES = 256 << 20  # of a tokenizer's file
SEGMENT = 1 << 20  # characters that a library sees at once: its memory is some 100 bytes a character
ROLES = ("unk", "bos", "eos", "pad", "mask", "cls", "sep")
IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))  # each run a word, as in BERT

Array = np.ndarray[Any, Any]
Offsets = list[tuple[int, int]]


class Joints(NamedTuple):
    """Which pieces go on with the word before them, and whose word can go on after them: (V,) bool each."""

    left: Array
    right: Array


class Tokenizer(ABC):
    """`special` has the ids of the control symbols that there are, by role (see ROLES), `eos` among them always: it ends a
    document. `vocab_size`: all ids are below it."""

    file: ClassVar[str]
    content: bytes
    vocab_size: int
    special: dict[str, int]

    @property
    def eos(self) -> int:
        """The id that ends a document; of a WordPiece vocabulary, which has none, [SEP]'s."""
        return self.special["eos"]

    @cached_property
    def sha256(self) -> str:
        """Of the tokenizer's file."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def joints(self) -> Joints:
        """Of every piece."""
        pairs = np.array([self._joints(index) for index in range(self.vocab_size)], bool).reshape(-1, 2)
        return Joints(pairs[:, 0], pairs[:, 1])

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without a document end. Long texts are cut after line ends to bound the memory."""
        if len(text) <= SEGMENT:
            return self._encode(text)
        return [index for part in cut(text, SEGMENT) for index in self._encode(part)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """The same ids, and of each the characters (start, end) of `text` that it stands for.

        Starts never decrease. A piece may cover the white space before its word, or no character (a space that the
        tokenizer puts before every text); each of several byte pieces of one character covers that character.
        """
        ids: list[int] = []
        offsets: Offsets = []
        begin = 0
        for part in cut(text, SEGMENT):
            found, places = self._encode_with_offsets(part)
            ids += found
            offsets += [(start + begin, end + begin) for start, end in places]
            begin += len(part)
        return ids, offsets

    def word_starts(self, ids: Sequence[int] | Array) -> Array:
        """(P,) bool of (P,) ids: whether each piece begins a word. A word is a run of letters, digits and marks without
        white space; a punctuation mark or a run of ideographs is one of its own (BERT's words)."""
        ids = np.asarray(ids, np.int64)
        starts = np.ones(len(ids), bool)
        starts[1:] = ~(self.joints.left[ids[1:]] & self.joints.right[ids[:-1]])
        return starts

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control ids give no text. Raises ValueError on an id outside the vocabulary."""
        ids = list(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids must be 0 to {self.vocab_size - 1}")
        return self._decode(ids)

    def encode_array(self, text: str) -> Array:
        """The ids of `encode`, (P,) int32."""
        return np.array(self.encode(text), np.int32)

    def decode_many(self, rows: list[Array]) -> list[str]:
        """Text of each of several rows (P,) of ids that this tokenizer gave: they are not checked."""
        return [self._decode(row.tolist()) for row in rows]

    @abstractmethod
    def piece(self, index: int) -> str:
        """The piece as the tokenizer writes it."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def _joints(self, index: int) -> tuple[bool, bool]: ...


def joints_of(surface: bytes) -> tuple[bool, bool]:
    """Whether a piece that stands for these bytes of text goes on with a word on its left, and on its right. Where it has a
    part of a character, it does."""
    text = surface.decode(errors="replace")  # a part becomes U+FFFD
    return bool(text) and _in_word(text[0]), bool(text) and _in_word(text[-1])


def _in_word(character: str) -> bool:
    if any(first <= ord(character) <= last for first, last in IDEOGRAPHS):
        return False
    return character == "\ufffd" or character.isalnum() or unicodedata.category(character).startswith("M")


def by_role(found: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Ids of the roles that are filled, in the order of ROLES."""
    known = dict(found)
    return {role: known[role] for role in ROLES if known.get(role, -1) >= 0}


def cut(text: str, limit: int) -> Iterator[str]:
    """Parts of at most `limit` characters, cut after the last line end inside the limit where there is one."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]
