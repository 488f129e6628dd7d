"""`python -m pretrain prepare`: text in, shards of tokens, manifests and a tokenizer out.

    OUT/train/ and OUT/validation/    one source each: shards, their hashes, manifest.json, the tokenizer
    OUT/report.json                   what was read, skipped and why

Two passes over the text: one draws the tokenizer's sample (from training documents only), one encodes. A document goes
to validation by the hash of its text, so copies stay on one side and the split is stable when the corpus grows. The
bytes written depend on the text, the options and the seed; not on the number of processes, the clock or the folder.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pretrain.data import manifest as manifests
from pretrain.data.documents import Skipped, TextFile, read_documents, stdlib_corpus, text_files
from pretrain.data.encode import Encoder
from pretrain.data.folder import whole_folder
from pretrain.data.packing import CONCATENATED, LEAST, Packing, packer_of, sentence_ends
from pretrain.data.progress import Progress, print_report
from pretrain.data.shards import CHUNKS_PER_SHARD, ShardWriter, dtype_of, tokens_before
from pretrain.errors import UserError
from pretrain.huggingface.vocabulary import read_tokenizer
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import VocabularyTooLarge, train_tokenizer

VOCAB_SIZE = 8192
VALIDATION = 0.01
MAX_TRAIN_BYTES = 32 << 20
PARTS = ("train", "validation")
CONTENTS = (*PARTS, "stdin", "report.json")


@dataclass
class Part:
    """Counts of one part of the split."""

    documents: int = 0
    tokens: int = 0  # document ends included
    text_bytes: int = 0
    padding: int = 0  # of the tokens, what is filler in rows

    def add(self, tokens: int, text_bytes: int) -> None:
        """Count one document."""
        self.documents += 1
        self.tokens += tokens
        self.text_bytes += text_bytes


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

    def add_altered(self, names: Sequence[str]) -> None:
        """Count documents that do not decode to themselves, and keep the first names."""
        self.altered += len(names)
        self.altered_examples += names[: 20 - len(self.altered_examples)]


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
    packing: str = "concat"  # or fit, sentences: rows of seq_length tokens, see `pretrain.data.packing`
    seq_length: int | None = None
    tokens_per_chunk: int | None = None
    chunks_per_shard: int = CHUNKS_PER_SHARD
    strict: bool = False
    max_train_bytes: int = MAX_TRAIN_BYTES
    seed: int = 0

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


def wrong_chunk(tokens_per_chunk: int | None, row: int) -> str:
    """What is wrong with chunks of rows of `row` tokens; "" for nothing."""
    if not tokens_per_chunk or tokens_per_chunk % row == 0:
        return ""
    nearest = max(row, tokens_per_chunk // row * row)
    return f"--tokens-per-chunk must be a multiple of a row's {row:,} tokens, such as {nearest:,}, not {tokens_per_chunk:,}"


def main(args: Any) -> None:
    """The command. `args` has the attributes texts, stdlib, pairs, out, processes and those of `Options`."""
    options = Options(
        **{
            name: getattr(args, name)
            for name in Options.__dataclass_fields__
            if getattr(args, name, None) is not None and name != "user_symbols"
        },
        user_symbols=tuple(getattr(args, "user_symbols", None) or ()),
    )
    print_report(_prepared(args, options), args.out)


def _prepared(args: Any, options: Options) -> Report:
    lengths = args.source_length, args.target_length
    if not args.pairs:
        if lengths != (None, None):
            raise UserError("--source-length and --target-length are of the rows that --pairs makes.")
        return prepare(args.texts or [], args.out, options, args.stdlib, args.processes)
    from pretrain.data.pairs import SOURCE_LENGTH, TARGET_LENGTH, Lengths, prepare_pairs

    if (options.packing, options.seq_length) != ("concat", None):
        raise UserError("--packing and --seq-length are of text; --pairs has --source-length and --target-length.")
    if args.stdlib:
        raise UserError("--stdlib is text, not pairs: leave it out, or --pairs.")
    sides = Lengths(lengths[0] or SOURCE_LENGTH, lengths[1] or TARGET_LENGTH)
    return prepare_pairs(args.texts or [], args.out, sides, options, processes_of(args.processes))


def prepare(
    texts: Sequence[str | Path],
    out: str | Path,
    options: Options | None = None,
    stdlib: bool = False,
    processes: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Prepare `texts` (files, folders, "-" for standard input) and, with `stdlib`, Python's own sources, into `out`.

    processes: that encode (default: one a core). say: takes lines about the progress (default: standard error).
    Raises UserError for a user's mistake; then, and when interrupted, `out` is as it was.
    """
    options = options or Options()
    options.check()
    processes = processes_of(processes)
    if not texts and not stdlib:
        raise UserError("There is no text to prepare: name files or folders, - for standard input, or --stdlib.")
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    with whole_folder(out, CONTENTS, say) as draft:
        files = [*_files(texts, draft), *(stdlib_corpus() if stdlib else ())]

        def documents(skipped: Skipped) -> Iterator[tuple[bytes, str]]:
            for document in read_documents(files, options.split, options.text_field, skipped):
                yield document.text.encode(), document.text

        tokenizer = tokenizer_of(documents, options, say)
        return _write(draft, files, tokenizer, options, processes, say)


def processes_of(wished: int | None) -> int:
    """How many encode: one a core unless wished otherwise. Raises UserError for less than one."""
    if wished is not None and wished < 1:
        raise UserError(f"--processes must be at least 1, not {wished}.")
    return wished or len(os.sched_getaffinity(0))


def _files(texts: Sequence[str | Path], draft: Path) -> list[TextFile]:
    """The files to read; standard input is kept in a file, since it is read twice."""
    files: list[TextFile] = []
    if sum(str(text) == "-" for text in texts) > 1:
        raise UserError("- stands for standard input and can be named once.")
    for text in texts:
        if str(text) != "-":
            files += text_files([text])
            continue
        with open(draft / "stdin", "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        files.append(TextFile(draft / "stdin", "standard input"))
    if texts and not files:
        raise UserError("The folders hold no text files: name the files themselves if their suffixes are unusual.")
    return files


def tokenizer_of(
    read: Callable[[Skipped], Iterable[tuple[bytes, str]]], options: Options, say: Callable[[str], None]
) -> Tokenizer:
    """The given tokenizer, or one trained on a sample of the training texts. read: gives each text behind the bytes whose
    hash tells its part, and counts what it skips."""
    if options.tokenizer is not None:
        return read_tokenizer(Path(options.tokenizer))
    say("Reading the text to train a tokenizer")

    def texts() -> Iterator[str]:
        skipped, documents = Skipped(options.strict), dict.fromkeys(PARTS, 0)
        for mark, text in read(skipped):
            name = part_of(mark, options)
            documents[name] += 1
            if name == "train":
                yield text
        check_split(documents, skipped, options)

    arguments = (options.model_type, options.user_symbols, None, options.max_train_bytes, options.seed)
    if options.vocab_size is not None:
        return train_tokenizer(texts(), options.vocab_size, *arguments)
    try:
        return train_tokenizer(texts(), VOCAB_SIZE, *arguments)
    except VocabularyTooLarge as error:
        say(f"The text is small: its vocabulary is {error.largest} in place of {VOCAB_SIZE}")
        return train_tokenizer(texts(), error.largest, *arguments)


def part_of(text: bytes, options: Options) -> str:
    """The part that a document, or a pair, belongs to."""
    share = VALIDATION if options.validation is None else options.validation
    mark = xxhash.xxh64_intdigest(text, seed=(options.seed + 0x5EED) % 2**64)
    return PARTS[mark < share * 2**64]


def check_split(documents: Mapping[str, int], skipped: Skipped, options: Options) -> None:
    """Raises UserError if a part that must have documents has none."""
    train, validation = (documents[name] for name in PARTS)
    if not train and not validation:
        reasons = (
            f"{count} {reason}, such as {skipped.examples[reason][0]}" for reason, count in skipped.counts.items()
        )
        raise UserError(f"The corpus is empty: no document could be read ({'; '.join(reasons) or 'there is none'}).")
    if not train or (options.validation and not validation):
        raise UserError(
            f"Of {train + validation} documents none fell to {PARTS[bool(train)]}: split the text into more documents "
            "(--split blank-line), or change --validation (0 leaves it out)."
        )


def _write(
    draft: Path,
    files: Sequence[TextFile],
    tokenizer: Tokenizer,
    options: Options,
    processes: int,
    say: Callable[[str], None],
) -> Report:
    report = Report(tokenizer.vocab_size, tokenizer.sha256)
    skipped = Skipped(options.strict, report.skipped, report.examples)
    documents = read_documents(files, options.split, options.text_field, skipped)
    dtype, packing = dtype_of(tokenizer.vocab_size), options.rows
    writers = {
        name: ShardWriter(draft / name, dtype, options.tokens_per_chunk, options.chunks_per_shard, packing.row)
        for name in PARTS
    }
    ends = sentence_ends(tokenizer) if packing.kind == "sentences" else None
    packers = {name: packer_of(packing, dtype, tokenizer.eos, ends) for name in PARTS}
    encoder = Encoder(tokenizer, processes)
    try:
        with Progress(files, say) as progress:
            for batch, encoded in encoder(documents):
                starts = np.cumsum([0, *encoded.lengths])
                for document, start, length in zip(batch, starts, encoded.lengths, strict=False):
                    data = document.text.encode()
                    name = part_of(data, options)
                    for rows in packers[name].add(encoded.tokens[start : start + length]):
                        writers[name].add(rows)
                    report.parts[name].add(length, len(data))
                    progress.add(length, len(data))
                report.add_altered(encoded.altered)
    finally:
        encoder.close()
    check_split({name: part.documents for name, part in report.parts.items()}, skipped, options)
    for name, part in report.parts.items():
        for rows in packers[name].finish():
            writers[name].add(rows)
        if part.documents and packing.row > 1:
            end_rows(writers[name], tokenizer.eos, part, packers[name].padding)
    finish(draft, report, tokenizer, writers, packing)
    return report


def end_rows(writer: ShardWriter, eos: int, part: Part, padding: int) -> None:
    """One end more, for a chunk has a look-ahead, which the last row needs as the others; and what was written counts."""
    writer.add(np.array([eos], writer.dtype))
    part.tokens, part.padding = writer.tokens, padding + 1


def finish(
    draft: Path,
    report: Report,
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    packing: Packing = CONCATENATED,
) -> None:
    """Write the manifests, once everything is written that they speak of."""
    for name, writer in writers.items():
        if report.parts[name].documents:
            _finish_part(draft / name, report.parts[name], tokenizer, writer, packing)
        else:
            (draft / name).rmdir()
    (draft / "stdin").unlink(missing_ok=True)
    (draft / "report.json").write_bytes(manifests.canonical(asdict(report)))


def _finish_part(
    folder: Path, part: Part, tokenizer: Tokenizer, writer: ShardWriter, packing: Packing = CONCATENATED
) -> None:
    shards = writer.finish()
    (folder / tokenizer.file).write_bytes(tokenizer.content)
    manifest = manifests.Manifest(
        folder=folder,
        fingerprint="",
        dtype=writer.dtype,
        tokens_per_chunk=writer.tokens_per_chunk,
        vocab_size=tokenizer.vocab_size,
        tokenizer_file=tokenizer.file,
        tokenizer_sha256=tokenizer.sha256,
        special=tokenizer.special,
        documents=part.documents,
        tokens=part.tokens,
        text_bytes=part.text_bytes,
        shards=(),
        packing=packing,
        padding=part.padding,
    )
    first, entries = 0, []
    for shard in shards:
        last = first + shard["chunks"]
        tokens = tokens_before(last, manifest) - tokens_before(first, manifest)
        entries.append({**shard, "tokens": tokens})
        first = last
    value = {**manifests.describe(manifest), "shards": entries}
    (folder / manifests.NAME).write_bytes(manifests.canonical(value))
    manifests.Manifest.load(folder)  # what was written is what will be accepted
