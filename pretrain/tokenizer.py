"""Text to token ids and back, over SentencePiece; and the training of a tokenizer on a bounded sample of a corpus.

Trained here, a tokenizer is lossless: byte fallback, no normalisation, no added spaces, so `decode(encode(text)) ==
text` but for text that holds U+2581, SentencePiece's own mark for a space. Newline and tab are pieces of their own and
runs of spaces may be pieces: on source code that is 30% fewer tokens than SentencePiece's defaults.

No text can produce a control id, so a document's end stays where `prepare` put it.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import xxhash

from pretrain.errors import UserError

MAX_MODEL_BYTES = 256 << 20
SEGMENT = 1 << 20  # characters that SentencePiece sees at once: its memory is some 100 bytes a character
PIECE = 4096  # characters of one training "sentence"; the sample is drawn piece by piece
ALWAYS_SYMBOLS = ("\n", "\t")
CONTROLS = ("<mask>", "<cls>", "<sep>")  # what masked and paired objectives need; text cannot produce them
TRAIN_THREADS = 4  # fixed, since the sums of unigram training depend on it


class VocabularyTooLarge(UserError):
    """The text does not hold as many pieces; `largest` is the largest vocabulary that it supports."""

    def __init__(self, asked: int, largest: int) -> None:
        super().__init__(
            f"A vocabulary of {asked} is larger than this text supports: the largest that works is {largest}."
        )
        self.largest = largest


class Tokenizer:
    """A SentencePiece model. `eos` is the id that ends a document; `sha256` is the model file's hash."""

    def __init__(self, model: bytes, name: str = "tokenizer.model") -> None:
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name} is not a SentencePiece model.") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eos: int = self._processor.eos_id()
        if self.eos < 0 or not self._processor.IsControl(self.eos):
            raise UserError(
                f"{name} has no control symbol that ends a document (</s>): train one with it (eos_id >= 0), "
                "or leave --tokenizer out and one is trained here."
            )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `.model` file. Raises UserError if it is missing or no SentencePiece model."""
        try:
            with open(path, "rb") as file:
                model = file.read(MAX_MODEL_BYTES + 1)
        except OSError as error:
            raise UserError(f"Cannot read the tokenizer {path}: {error.strerror}.") from error
        if not model or len(model) > MAX_MODEL_BYTES:
            raise UserError(f"{path} is not a SentencePiece model: it has {len(model)} bytes.")
        return cls(model, str(path))

    @property
    def special(self) -> dict[str, int]:
        """Ids of the special symbols that this tokenizer has, by name (unk, bos, eos, pad, mask, cls, sep)."""
        named = {name: getattr(self._processor, f"{name}_id")() for name in ("unk", "bos", "eos", "pad")}
        for piece in CONTROLS:
            index = self._processor.PieceToId(piece)
            named[piece.strip("<>")] = index if self._processor.IsControl(index) else -1
        return {name: index for name, index in named.items() if index >= 0}

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without a document end. Long texts are cut after line ends to bound the memory."""
        if len(text) <= SEGMENT:
            return self._processor.encode(text)
        return [index for part in cut(text, SEGMENT) for index in self._processor.encode(part)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control ids give no text. Raises ValueError on an id outside the vocabulary."""
        try:
            return self._processor.decode(list(ids))
        except (IndexError, TypeError) as error:  # TypeError: an id of more than 32 bits
            raise ValueError(f"token ids must be 0 to {self.vocab_size - 1}") from error

    def piece(self, index: int) -> str:
        """The piece as SentencePiece writes it (a space is U+2581)."""
        return self._processor.IdToPiece(index)


def cut(text: str, limit: int) -> Iterator[str]:
    """Parts of at most `limit` characters, cut after the last line end inside the limit where there is one."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


def sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """At most `max_bytes` of the texts' pieces: those of lowest hash, so neither order nor number of texts matters.

    One pass, memory bounded by `max_bytes`. Returned in the order of their hashes. A piece that is shed shuts out all of
    higher hash for good, or a short one that comes later would take the room that a long one left.
    """
    heap: list[tuple[int, str]] = []  # of hashes below zero, so that the highest is shed first
    size, shed = 0, -(2**64)
    for text in texts:
        for piece in cut(text, PIECE):
            data = piece.encode()
            mark = -xxhash.xxh64_intdigest(data, seed=seed % 2**64)
            if not data or mark <= shed:
                continue
            heapq.heappush(heap, (mark, piece))
            size += len(data)
            while size > max_bytes and len(heap) > 1:
                mark, last = heapq.heappop(heap)
                size, shed = size - len(last.encode()), max(shed, mark)
    return [piece for _, piece in sorted(heap, reverse=True)]


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    model_type: str = "bpe",
    user_symbols: Sequence[str] = (),
    out: str | Path | None = None,
    max_bytes: int = 32 << 20,
    seed: int = 0,
) -> Tokenizer:
    """Train on a sample of at most `max_bytes` of the texts; write the model to `out` where given.

    model_type: "bpe" or "unigram" (encodes 3.7x faster; 18x slower to train). user_symbols: strings that are always one
    token, beside newline and tab. The same texts (in any order), options and seed give the same bytes.
    Raises VocabularyTooLarge, or UserError for a vocabulary that is too small, an empty text or bad symbols.
    """
    if model_type not in ("bpe", "unigram"):
        raise UserError(f"The tokenizer's type is bpe or unigram, not {model_type!r}.")
    if vocab_size < 1 or max_bytes < 1:
        raise UserError("The vocabulary size and the bytes to train a tokenizer on must be at least 1.")
    pieces = sample(texts, max_bytes, seed)
    if not pieces:
        raise UserError("There is no text to train a tokenizer on.")
    tokenizer = Tokenizer(_train(pieces, vocab_size, model_type, _symbols(user_symbols)))
    if out is not None:
        Path(out).write_bytes(tokenizer.model)
    return tokenizer


def _symbols(user_symbols: Sequence[str]) -> list[str]:
    """All user-defined symbols. A reserved or empty one is refused: it would take the place of a control symbol."""
    reserved = {"<unk>", "<s>", "</s>", "<pad>", *CONTROLS}
    for symbol in user_symbols:
        if not symbol or symbol in reserved or re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", symbol) or "\0" in symbol:
            raise UserError(
                f"{symbol!r} cannot be a user symbol: it is empty or reserved ({', '.join(sorted(reserved))})."
            )
    return list(dict.fromkeys((*ALWAYS_SYMBOLS, *user_symbols)))


def _train(pieces: list[str], vocab_size: int, model_type: str, symbols: list[str]) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            user_defined_symbols=symbols,
            control_symbols=list(CONTROLS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * PIECE,
            shuffle_input_sentence=False,
            num_threads=TRAIN_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _explained(str(error), vocab_size) from error
    return model.getvalue()


def _explained(message: str, vocab_size: int) -> UserError:
    """SentencePiece's complaint in the user's terms."""
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        return VocabularyTooLarge(vocab_size, int(found[1]))
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"A vocabulary of {vocab_size} is too small for the characters of this text: at least {found[1]} is needed."
        )
    return UserError(f"The tokenizer could not be trained: {message.strip().splitlines()[-1]}")
