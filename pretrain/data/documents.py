"""Documents of a corpus: one after the other, from text files, folders, JSON lines, standard input, or one of the formats of
elsewhere (`pretrain/data/foreign/`).

Read twice (once to train the tokenizer, once to encode), so nothing here keeps more than one document in memory. The
order is the order in which sources were named and, inside a folder, that of the sorted relative paths: the same on
every machine. What cannot be read as text is skipped and counted with its reason in `Skipped`, or raises UserError when
strict.
"""

from __future__ import annotations

import io
import json
import os
import stat
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from pretrain.data import compressed
from pretrain.data.foreign import kinds
from pretrain.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from pretrain.tokenization.base import Tokenizer

SPLITS = ("file", "blank-line")
JSON_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (
    *(
        ".txt",
        ".text",
        ".md",
        ".rst",
        ".tex",
        ".org",
        ".adoc",
        ".html",
        ".htm",
        ".xml",
        ".csv",
        ".tsv",
        ".yaml",
        ".yml",
    ),
    *(".toml", ".ini", ".cfg", ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cs", ".go"),
    *(".rs", ".java", ".kt", ".scala", ".swift", ".js", ".jsx", ".ts", ".tsx", ".css", ".rb", ".php", ".pl", ".lua"),
    *(".r", ".jl", ".hs", ".ml", ".sql", ".sh", ".bash", ".json", *JSON_SUFFIXES),
)
MAX_DOCUMENT_BYTES = 256 << 20
MAX_JSON_PARTS = 1 << 21  # lists and objects in one JSON value: each takes some 60 bytes for two or three of text
# encodings: its codec tables are a tenth of the text and no Python to learn from.
LEFT_OUT_OF_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
EXAMPLES = 20
TEST_SPLIT = "file of a test split (name the file itself to take it)"


@dataclass(frozen=True)
class Document:
    """One text. `name` says where it is from: a path, and the line for one of several in a file.

    tokens: its ids (P,) without a document end, where they came with it; the text is what they decode to. part: "train" or
    "validation" where the data set says where it belongs.
    """

    name: str
    text: str
    tokens: np.ndarray[Any, Any] | None = field(default=None, compare=False)
    part: str | None = None


@dataclass
class Skipped:
    """What was not used: counts by reason, and the first few names of each. Strict: the first one raises UserError."""

    strict: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, reason: str) -> None:
        """Count one file or document that is skipped."""
        if self.strict:
            raise UserError(f"{name}: {reason} (without --strict it would be skipped and counted).")
        self.leave_out(name, reason)

    def leave_out(self, name: str, reason: str) -> None:
        """Count one that is well as it is but not to be used; strict or not."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(name)

    def merge(self, counts: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> None:
        """Count what was skipped elsewhere, after what is counted here; one that is not to be used is no mistake."""
        for reason, count in counts.items():
            if self.strict and reason != TEST_SPLIT:
                self.add(examples[reason][0], reason)
            self.counts[reason] = self.counts.get(reason, 0) + count
            known = self.examples.setdefault(reason, [])
            known += examples[reason][: EXAMPLES - len(known)]


@dataclass(frozen=True)
class TextFile:
    """A file to read and the name that reports give it (as the user typed it, then the path inside the folder).

    span: of a file that is read in pieces, (first, behind the last) of its row groups, its documents, or the bytes of plain text
    or lines, which begins `line` lines behind the file's beginning. part: of a data set that
    is divided by its files' names, "train", "validation" or "test".
    """

    path: Path
    name: str
    span: tuple[int, int] | None = None
    part: str | None = None
    line: int = 0

    @property
    def is_compressed(self) -> bool:
        """Whether its size says nothing of how much text it holds."""
        return self.path.suffix.lower() in compressed.SUFFIXES or kinds.kind_of(self.path) is not None

    @property
    def is_json_lines(self) -> bool:
        return _bare_suffix(self.path) in JSON_SUFFIXES


@dataclass(frozen=True)
class Reading:
    """How files are read. split: one document a "file", or a paragraph ("blank-line") of text files. text_field: of JSON
    objects, or a table's column. tokenizer, eos_id: of files that hold tokens, and the id that ends a document there."""

    split: str = "file"
    text_field: str = "text"
    tokenizer: Tokenizer | None = None
    eos_id: int | None = None


def _bare_suffix(path: Path) -> str:
    """The suffix below a compression's: ".jsonl" of "a.jsonl.gz"."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in compressed.SUFFIXES else path.suffix.lower()


def text_files(sources: Sequence[str | Path]) -> list[TextFile]:
    """Files of the sources: a named file whatever its suffix; of a folder, recursively, the files with a text suffix or of a
    foreign format.

    Hidden files and folders inside a folder are left out. Raises UserError for a source that does not exist.
    """
    files: list[TextFile] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            _check_not_shards(path, source)
            files += [
                TextFile(path / inner, f"{source}/{inner}", part=kinds.part_of_name(inner)) for inner in _walk(path)
            ]
        elif kinds.kind_of(path) == kinds.MEGATRON or (not path.exists() and kinds.index_of(path).is_file()):
            files.append(TextFile(kinds.index_of(path), str(kinds.index_of(Path(source)))))
        elif path.exists():
            files.append(TextFile(path, str(source)))
        else:
            raise UserError(f"There is no file or folder {source} to read text from.")
    return files


def _walk(folder: Path) -> list[str]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and (
                _bare_suffix(Path(name)) in TEXT_SUFFIXES or kinds.is_listed(Path(root) / name)
            ):
                found.append((Path(root) / name).relative_to(folder).as_posix())
    return sorted(found)


def _check_not_shards(folder: Path, source: str | Path) -> None:
    if (folder / "manifest.json").is_file() and (folder / "shard-00000.tar").is_file():
        raise UserError(f"{source} holds shards that prepare wrote: name it as data.train as it is.")


def stdlib_corpus() -> list[TextFile]:
    """The Python standard library's own sources, without tests and installed packages: a corpus on every machine."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = [
        name
        for name in _walk(folder)
        if name.endswith(".py") and not LEFT_OUT_OF_STDLIB & set(Path(name).parts) and "_sysconfigdata" not in name
    ]
    return [TextFile(folder / name, f"stdlib/{name}") for name in names]


def read_documents(
    files: Sequence[TextFile],
    split: str = "file",
    text_field: str = "text",
    skipped: Skipped | None = None,
    tokenizer: Tokenizer | None = None,
    eos_id: int | None = None,
) -> Iterator[Document]:
    """Documents of the files, in order; see Reading for the options. JSON lines files give one a line, from the object's
    `text_field`. Raises UserError where a file of tokens does not go with the tokenizer, or a table has no such column."""
    if split not in SPLITS:
        raise UserError(f"Documents are split by {' or '.join(SPLITS)}, not by {split!r}.")
    skipped = Skipped() if skipped is None else skipped
    reading = Reading(split, text_field, tokenizer, eos_id)
    for file in files:
        if file.part == "test":
            skipped.leave_out(file.name, TEST_SPLIT)
            continue
        try:
            for document in _documents_of(file, reading, skipped):
                yield replace(document, part=file.part) if file.part else document
        except compressed.DAMAGED:
            skipped.add(file.name, "damaged compression")
        except OSError as error:
            skipped.add(file.name, f"cannot be read: {error.strerror}")


def pieces_of(file: TextFile) -> list[TextFile]:
    """The file cut into what can be read by itself, in order: runs of a Parquet file's row groups or of Megatron-LM's
    documents, by the content alone; any other file whole. Together they give the documents of the file, under the same names."""
    kind = kinds.kind_of(file.path)
    spans: list[tuple[int, int]] = []
    if kind == kinds.PARQUET:
        from pretrain.data.foreign.parquet import cut_parquet

        spans = cut_parquet(file)
    elif kind == kinds.MEGATRON:
        from pretrain.data.foreign.megatron import cut_megatron

        spans = cut_megatron(file)
    return [replace(file, span=span) for span in spans] or [file]


def _documents_of(file: TextFile, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    if not stat.S_ISREG(os.stat(file.path).st_mode):
        return skipped.add(file.name, "not a regular file")
    kind = kinds.kind_of(file.path)
    if kind is not None:
        yield from _foreign(kind, file, reading, skipped)
        return
    with compressed.open_bytes(file.path) if file.span is None else _open_range(file.path, *file.span) as stream:
        if file.is_json_lines:
            yield from json_lines(file.name, stream, reading.text_field, skipped, file.line)
        elif reading.split == "file":
            yield from text_document(file.name, stream.read(MAX_DOCUMENT_BYTES + 1), skipped)
        else:
            yield from _paragraphs(file.name, stream, skipped, file.line)


def _open_range(path: Path, start: int, end: int) -> IO[bytes]:
    """The bytes from start to end of an uncompressed file."""
    return cast(IO[bytes], io.BufferedReader(_Range(path, start, end), 1 << 18))


class _Range(io.RawIOBase):
    def __init__(self, path: Path, start: int, end: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._file.seek(start)
        self._left = end - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _foreign(kind: str, file: TextFile, reading: Reading, skipped: Skipped) -> Iterator[Document]:
    """Of a format of elsewhere; its library is imported here, so that only who has such files pays for it."""
    if kind == kinds.WEBDATASET:
        from pretrain.data.foreign.samples import read_webdataset as read
    elif kind == kinds.PARQUET:
        from pretrain.data.foreign.parquet import read_parquet as read
    else:
        from pretrain.data.foreign.megatron import read_megatron as read
    yield from read(file, reading, skipped)


def text_document(name: str, data: bytes, skipped: Skipped) -> Iterator[Document]:
    """The bytes as a document, if they are text."""
    reason = ""
    if len(data) > MAX_DOCUMENT_BYTES:
        reason = f"a document larger than {MAX_DOCUMENT_BYTES >> 20} MiB (split a file of many by blank-line)"
    elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
        reason = "encoded as UTF-16, not UTF-8"
    elif b"\0" in data:
        reason = "binary (holds a zero byte)"
    elif not data.strip():
        reason = "empty"
    if reason:
        return skipped.add(name, reason)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return skipped.add(name, "not UTF-8 text")
    yield Document(name, text)


def _paragraphs(name: str, stream: IO[bytes], skipped: Skipped, number: int) -> Iterator[Document]:
    """Runs of lines between blank lines, without the last line's end. Named by their first line; number: of lines before."""
    lines: list[bytes] = []
    size, first = 0, number + 1
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if line.strip():
            first = first if lines else number
            size += len(line)
            if size <= MAX_DOCUMENT_BYTES or not lines:
                lines.append(line)
        elif lines:
            yield from _paragraph(f"{name}:{first}", lines, size, skipped)
            lines, size = [], 0
    if lines:
        yield from _paragraph(f"{name}:{first}", lines, size, skipped)


def _paragraph(name: str, lines: list[bytes], size: int, skipped: Skipped) -> Iterator[Document]:
    if size > MAX_DOCUMENT_BYTES:
        return skipped.add(name, f"a paragraph larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
    yield from text_document(name, b"".join(lines).rstrip(b"\r\n"), skipped)


def json_lines(name: str, stream: IO[bytes], text_field: str, skipped: Skipped, number: int = 0) -> Iterator[Document]:
    """A document a line, from an object's field. number: of lines before."""
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > MAX_DOCUMENT_BYTES:
            skipped.add(where, f"a line larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
        elif line.strip():
            yield from json_document(where, line, text_field, skipped)


def json_document(where: str, line: bytes, text_field: str, skipped: Skipped) -> Iterator[Document]:
    if line.count(b"[") + line.count(b"{") > MAX_JSON_PARTS:
        return skipped.add(where, f"a JSON object of more than {MAX_JSON_PARTS:,} parts")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return skipped.add(where, "not a JSON object")
    if not isinstance(value, dict):
        return skipped.add(where, "not a JSON object")
    text = value.get(text_field)
    if not isinstance(text, str):
        return skipped.add(where, f"without a text field {text_field!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return skipped.add(where, "holds half a surrogate pair, which UTF-8 cannot write")
    if not text.strip():
        return skipped.add(where, "empty")
    yield Document(where, text)
