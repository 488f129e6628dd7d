"""What the user asks of prepare, and what it tells at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from pretrain.data import manifest as manifests
from pretrain.data.documents import EXAMPLES, SPLITS, Skipped
from pretrain.data.packing import LEAST, Packing
from pretrain.data.shards import CHUNKS_PER_SHARD
from pretrain.errors import UserError

VOCAB_SIZE = 8192
VALIDATION = 0.01
MAX_TRAIN_BYTES = 32 << 20
PARTS = ("train", "validation")
UNDECIDING = ("tokenizer", "select", "strict")  # two go by their content, the last never changes what is written


@dataclass(frozen=True)
class Options:
    """What decides the bytes that are written, but for the text. None: chosen by the size of the corpus."""

    vocab_size: int | None = None  # of the tokenizer to train
    tokenizer: str | Path | None = None  # path of one to take instead: a .model, or Hugging Face files
    model_type: str = "bpe"
    user_symbols: tuple[str, ...] = ()
    validation: float | None = None  # share of the documents
    split: str = "file"
    text_field: str = "text"
    eos_id: int | None = None  # that ends a document in files of tokens
    packing: str = "concat"  # or fit, sentences: rows of seq_length tokens, see `pretrain.data.packing`
    seq_length: int | None = None
    tokens_per_chunk: int | None = None
    chunks_per_shard: int = CHUNKS_PER_SHARD
    strict: bool = False
    max_train_bytes: int = MAX_TRAIN_BYTES
    seed: int = 0
    select: str | Path | None = None  # file of what is kept, see `pretrain.data.selection`
    piece_bytes: int | None = None  # of text, that one process does at a time

    def check(self) -> None:
        """Raises UserError with every option that cannot be."""
        wrong = []
        if self.vocab_size is not None and self.tokenizer is not None:
            wrong.append("give --vocab-size (to train a tokenizer) or --tokenizer (to take one), not both")
        if self.validation is not None and not 0 <= self.validation < 1:
            wrong.append(f"--validation is a share from 0 to below 1, not {self.validation}")
        if self.tokens_per_chunk is not None and not 1 <= self.tokens_per_chunk <= manifests.MAX_TOKENS_PER_CHUNK:
            wrong.append(
                f"--tokens-per-chunk must be 1 to {manifests.MAX_TOKENS_PER_CHUNK:,}, not {self.tokens_per_chunk}"
            )
        if self.chunks_per_shard < 1:
            wrong.append("a shard must hold at least one chunk")
        if self.split not in SPLITS:
            wrong.append(f"documents are split by {' or '.join(SPLITS)}, not by {self.split!r}")
        if self.eos_id is not None and self.tokenizer is None:
            wrong.append("--eos-id is of files of tokens, which need the --tokenizer that they were made with")
        if self.piece_bytes is not None and self.piece_bytes < 1:
            wrong.append(f"--piece-bytes must be at least 1, not {self.piece_bytes}")
        wrong += self._wrong_packing()
        if wrong:
            raise UserError("\n".join(wrong))

    def _wrong_packing(self) -> Iterator[str]:
        if self.packing == "concat":
            if self.seq_length is not None:
                yield "--seq-length has no effect without --packing fit or sentences: leave it out, or give either"
            return
        if self.packing not in LEAST or self.seq_length is None:
            yield f"--packing {self.packing} needs --seq-length, the tokens of a row, and is concat, fit or sentences"
        elif not LEAST[self.packing] <= self.seq_length <= manifests.MAX_TOKENS_PER_CHUNK:
            most = f"{manifests.MAX_TOKENS_PER_CHUNK:,}"
            yield f"--seq-length must be {LEAST[self.packing]} to {most} with --packing {self.packing}, not {self.seq_length}"
        elif wrong := wrong_chunk(self.tokens_per_chunk, self.seq_length):
            yield wrong

    @property
    def rows(self) -> Packing:
        """The packing of text, with its length."""
        return Packing(self.packing, () if self.seq_length is None else (self.seq_length,))

    def deciding(self) -> dict[str, Any]:
        """As JSON has them, those that a work that goes on must share."""
        values = {**asdict(self), "user_symbols": list(self.user_symbols)}
        return {name: value for name, value in values.items() if name not in UNDECIDING}


def wrong_chunk(tokens_per_chunk: int | None, row: int) -> str:
    """What is wrong with chunks of rows of `row` tokens; "" for nothing."""
    if not tokens_per_chunk or tokens_per_chunk % row == 0:
        return ""
    nearest = max(row, tokens_per_chunk // row * row)
    return f"--tokens-per-chunk must be a multiple of a row's {row:,} tokens, such as {nearest:,}, not {tokens_per_chunk:,}"


@dataclass
class Part:
    """Counts of one part of the split."""

    documents: int = 0
    tokens: int = 0  # document ends included
    text_bytes: int = 0
    padding: int = 0  # of the tokens, what is filler in rows


@dataclass
class Report:
    """What prepare did: counts by part and by reason, and names of documents that do not decode to themselves."""

    vocab_size: int
    tokenizer_sha256: str
    parts: dict[str, Part] = field(default_factory=lambda: {name: Part() for name in PARTS})
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    altered: int = 0
    altered_examples: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # by a selection: documents by reason

    def add_altered(self, names: Sequence[str]) -> None:
        """Count documents that do not decode to themselves, and keep the first names."""
        self.altered += len(names)
        self.altered_examples += names[: EXAMPLES - len(self.altered_examples)]

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        value = asdict(self)
        if not self.dropped:
            del value["dropped"]
        return value

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Report:
        """That of report.json."""
        return cls(**{**value, "parts": {name: Part(**part) for name, part in value["parts"].items()}})

    def add(self, piece: Mapping[str, Any]) -> None:
        """What came of the next piece: this report's fields, as JSON has them."""
        for name, part in piece["parts"].items():
            whole = self.parts[name]
            whole.documents += part["documents"]
            whole.tokens += part["tokens"]
            whole.text_bytes += part["text_bytes"]
            whole.padding += part["padding"]
        for reason, count in piece["skipped"].items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples += piece["examples"][reason][: EXAMPLES - len(examples)]
        self.altered += piece["altered"]
        self.altered_examples += piece["altered_examples"][: EXAMPLES - len(self.altered_examples)]


def part_of(text: bytes, options: Options) -> str:
    """The part that a document, or a pair, belongs to."""
    share = VALIDATION if options.validation is None else options.validation
    mark = xxhash.xxh64_intdigest(text, seed=(options.seed + 0x5EED) % 2**64)
    return PARTS[mark < share * 2**64]


class NoDocuments(UserError):
    """A part of the split would be empty, so that what was done is of no use."""


def check_split(documents: Mapping[str, int], skipped: Skipped, options: Options) -> None:
    """Raises NoDocuments if a part that must have documents has none."""
    train, validation = (documents[name] for name in PARTS)
    if not train and not validation:
        reasons = (
            f"{count} {reason}, such as {skipped.examples[reason][0]}" for reason, count in skipped.counts.items()
        )
        raise NoDocuments(f"The corpus is empty: no document could be read ({'; '.join(reasons) or 'there is none'}).")
    if not train or (options.validation and not validation):
        raise NoDocuments(
            f"Of {train + validation} documents none fell to {PARTS[bool(train)]}: split the text into more documents "
            "(--split blank-line), or change --validation (0 leaves it out)."
        )
