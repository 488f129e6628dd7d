"""SentencePiece's tokenizers: those that are trained here, and any other `.model`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import sentencepiece

from pretrain.errors import UserError
from pretrain.tokenization.base import SEGMENT, Array, Offsets, Tokenizer, by_role, cut, joints_of

SPACE = "\u2581"  # as SentencePiece writes a space
CONTROLS = {"mask": ("<mask>", "[MASK]"), "cls": ("<cls>", "[CLS]"), "sep": ("<sep>", "[SEP]")}


class Pieces(Tokenizer):
    """A SentencePiece model. name: for messages."""

    file: ClassVar[str] = "tokenizer.model"

    def __init__(self, content: bytes, name: str = file) -> None:
        self.content = content
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except (
            RuntimeError,
            OSError,
            UnicodeDecodeError,
        ) as error:  # the last: a message about a piece that is no text
            raise UserError(f"{name} is not a SentencePiece model.") from error
        self.vocab_size = self._processor.vocab_size()
        try:
            self._processor.IdToPiece(list(range(self.vocab_size)))
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not a SentencePiece model: one of its pieces is not UTF-8 text.") from error
        self.special = self._special()
        if "eos" not in self.special:
            raise UserError(
                f"{name} has no control symbol that ends a document (</s>): train one with it (eos_id >= 0), "
                "or leave --tokenizer out and one is trained here."
            )

    def _special(self) -> dict[str, int]:
        found = {role: getattr(self._processor, f"{role}_id")() for role in ("unk", "bos", "eos", "pad")}
        if found["eos"] >= 0 and not self._processor.IsControl(found["eos"]):
            found["eos"] = -1  # one that text can produce
        for role, names in CONTROLS.items():
            indices = (self._processor.PieceToId(name) for name in names)
            found[role] = next((index for index in indices if self._processor.IsControl(index)), -1)
        if found["eos"] < 0:  # ALBERT's vocabulary, like BERT's
            found["eos"] = found["sep"]
        return by_role(found.items())

    def piece(self, index: int) -> str:
        """The piece as SentencePiece writes it (a space is U+2581)."""
        return self._processor.IdToPiece(index)

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        found = self._processor.encode(text, return_type="offset_mapping")
        ids, offsets = found["ids"], found["offsets"]
        # SentencePiece gives a character to the last of its bytes, and nothing to those before.
        for place in range(len(ids) - 2, -1, -1):
            start, end = offsets[place]
            if start == end == offsets[place + 1][0] and self._processor.IsByte(ids[place]):
                offsets[place] = (start, offsets[place + 1][1])
        return ids, offsets

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def encode_array(self, text: str) -> Array:
        """Without a Python object for each id, which would take a sixth of the time."""
        parts = [self._processor.encode(part, return_type="numpy") for part in cut(text, SEGMENT)]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def decode_many(self, rows: list[Array]) -> list[str]:
        """In one call: half of the time of a call for each with its ids as a list."""
        if not rows or not all(map(len, rows)):  # SentencePiece takes the first row's kind for that of all
            return super().decode_many(rows)
        return self._processor.decode(rows, num_threads=1)  # type: ignore[arg-type]  # which takes arrays, untold

    def _joints(self, index: int) -> tuple[bool, bool]:
        if self._processor.IsControl(index):
            return False, False
        if self._processor.IsByte(index):
            return joints_of(bytes.fromhex(self.piece(index)[3:5]))
        return joints_of(self.piece(index).replace(SPACE, " ").encode())
