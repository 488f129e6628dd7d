"""Tokenizers of Hugging Face's `tokenizers`: BERT's WordPiece, the byte-level BPE of GPT-2 and later, Llama's, and others.

Its file is their tokenizer.json with one field more, `special`: the ids of the control symbols by role, which Hugging Face
keeps in other files (`pretrain.tokenization.foreign` makes one of them). The library is imported where such a tokenizer is
opened and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

from pretrain.errors import UserError
from pretrain.tokenization.base import ROLES, Offsets, Tokenizer, by_role, joints_of
from pretrain.tokenization.pieces import SPACE

MAX_JSON_BYTES = 128 << 20  # the largest vocabularies in use need 35 MB
MAX_ID = 1 << 24
Json = dict[str, Any]


class Library(Tokenizer):
    """A tokenizer.json with `special`. name: for messages."""

    file: ClassVar[str] = "tokenizer.json"

    def __init__(self, content: bytes, name: str = file) -> None:
        self.content, self.name = content, name
        self.description = parse_json(content, name)
        special = self.description.pop("special", None)
        self._tokenizer = _open(self.description, name)
        self._pieces = {index: piece for piece, index in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._pieces, default=-1) + 1
        if not 1 <= self.vocab_size <= MAX_ID:
            raise UserError(f"{name}: its largest id is {self.vocab_size - 1:,}; ids below {MAX_ID:,} can be used.")
        self.special = self._special(special)
        self._added = {token["content"] for token in self.description.get("added_tokens") or ()}
        controls = {index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._controls = controls - {self.special.get("unk", -1)}

    def _special(self, value: Any) -> dict[str, int]:
        known = isinstance(value, dict) and "eos" in value and value.keys() <= set(ROLES)
        if not known or not all(type(index) is int and index in self._pieces for index in value.values()):
            raise UserError(f"{self.name}: `special` must give ids of its vocabulary by role, eos among them.")
        return by_role(value.items())

    def piece(self, index: int) -> str:
        """The piece as the library writes it; empty for an id that the vocabulary leaves out."""
        return self._pieces.get(index, "")

    def _encode(self, text: str) -> list[int]:
        return self._encode_with_offsets(text)[0]

    def _encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        with _told(f"{self.name} cannot encode this text"):
            found = self._tokenizer.encode(text, add_special_tokens=False)
            if self._controls.isdisjoint(found.ids):
                return found.ids, found.offsets
            return self._without_controls(text, found.ids, found.offsets)

    def _without_controls(self, text: str, ids: list[int], offsets: Offsets) -> tuple[list[int], Offsets]:
        """A model whose own vocabulary holds a control symbol as a word may give its id for that word. It becomes the
        unknown piece, or, where there is none, is spelled character by character."""
        unk = self.special.get("unk")
        kept: list[tuple[int, tuple[int, int]]] = []
        for index, (start, end) in zip(ids, offsets, strict=True):
            if index not in self._controls:
                kept.append((index, (start, end)))
            elif unk is not None:
                kept.append((unk, (start, end)))
            else:
                kept += [(i, (at, at + 1)) for at in range(start, end) for i in self._spelled(text[at])]
        return [index for index, _ in kept], [place for _, place in kept]

    def _spelled(self, character: str) -> list[int]:
        found = self._tokenizer.encode(character, add_special_tokens=False).ids
        return [index for index in found if index not in self._controls]

    def _decode(self, ids: list[int]) -> str:
        with _told(f"{self.name} cannot decode"):
            return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _joints(self, index: int) -> tuple[bool, bool]:
        piece = self.piece(index)
        if index in self._controls or not piece:
            return False, False
        if piece in self._added:
            return joints_of(piece.encode())
        model = self.description["model"]
        if model.get("type") == "WordPiece":
            return piece.startswith(model.get("continuing_subword_prefix", "##")), True
        return joints_of(self._surface(piece))

    def _surface(self, piece: str) -> bytes:
        """The bytes of text that a piece stands for."""
        if self._byte_level:
            return bytes(BYTES[character] for character in piece if character in BYTES)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes.fromhex(piece[3:5])
        return piece.replace(SPACE, " ").encode()

    @cached_property
    def _byte_level(self) -> bool:
        steps = [self.description.get(step) for step in ("normalizer", "pre_tokenizer", "decoder")]
        return any('"type": "ByteLevel"' in json.dumps(step) for step in steps)


def _open(description: Json, name: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"{name} is a tokenizer of Hugging Face's `tokenizers`, which is not installed: "
            "pip install 'pretrain-engine[finetune]'"
        ) from error
    with _told(f"{name} is not a tokenizer that Hugging Face's `tokenizers` {tokenizers.__version__} reads"):
        opened = tokenizers.Tokenizer.from_str(json.dumps({**description, "truncation": None, "padding": None}))
    opened.encode_special_tokens = True  # as text, that is: control symbols are not looked for in it
    return opened


@contextmanager
def _told(what: str) -> Iterator[None]:
    """The library's errors in one line. Where Rust panics it raises what is no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{what}: {error!s:.200}") from error
        raise


def parse_json(content: bytes, name: str) -> Json:
    """The object of a JSON file. Raises UserError where it is none, or too large to parse."""
    if len(content) > MAX_JSON_BYTES:
        raise UserError(f"{name} has {len(content):,} bytes, more than the {MAX_JSON_BYTES:,} that are read.")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON: {error!s:.100}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} is no JSON object.")
    return value


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level piece stands for: printable ones stand for themselves, and the others
    are U+0100 and on, in order (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_characters()
