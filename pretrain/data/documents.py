"""Documents of a corpus: one after the other, from text files, folders, JSON lines or standard input.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from pretrain.data import compressed
from pretrain.errors import UserError

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
# encodings: its codec tables are a tenth of the text and no Python to learn from.
LEFT_OUT_OF_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
EXAMPLES = 20


@dataclass(frozen=True)
class Document:
    """One text. `name` says where it is from: a path, and the line for one of several in a file."""

    name: str
    text: str


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
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(name)

    def merge(self, counts: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> None:
        """Count what was skipped elsewhere, after what is counted here."""
        for reason, count in counts.items():
            self.add(examples[reason][0], reason)
            self.counts[reason] += count - 1
            known = self.examples[reason]
            known += examples[reason][1 : 1 + EXAMPLES - len(known)] if known[-1] == examples[reason][0] else []


@dataclass(frozen=True)
class TextFile:
    """A file to read and the name that reports give it (as the user typed it, then the path inside the folder)."""

    path: Path
    name: str

    @property
    def is_compressed(self) -> bool:
        return self.path.suffix.lower() in compressed.SUFFIXES

    @property
    def is_json_lines(self) -> bool:
        return _bare_suffix(self.path) in JSON_SUFFIXES


class Span(NamedTuple):
    """A range of a file's bytes, `line` lines behind its beginning; end None: the whole file, whatever its compression."""

    start: int
    end: int | None
    line: int


WHOLE = Span(0, None, 0)


def _bare_suffix(path: Path) -> str:
    """The suffix below a compression's: ".jsonl" of "a.jsonl.gz"."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in compressed.SUFFIXES else path.suffix.lower()


def text_files(sources: Sequence[str | Path]) -> list[TextFile]:
    """Files of the sources: a named file whatever its suffix; of a folder the files with a text suffix, recursively.

    Hidden files and folders inside a folder are left out. Raises UserError for a source that does not exist.
    """
    files: list[TextFile] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files += [TextFile(path / inner, f"{source}/{inner}") for inner in _walk(path)]
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
            if not name.startswith(".") and _bare_suffix(Path(name)) in TEXT_SUFFIXES:
                found.append((Path(root) / name).relative_to(folder).as_posix())
    return sorted(found)


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
    files: Sequence[TextFile], split: str = "file", text_field: str = "text", skipped: Skipped | None = None
) -> Iterator[Document]:
    """Documents of the files, in order. split: one document a "file", or a paragraph ("blank-line") of text files;
    JSON lines files give one a line, from the object's `text_field`."""
    yield from read_spans([(file, WHOLE) for file in files], split, text_field, skipped)


def read_spans(
    spans: Iterable[tuple[TextFile, Span]],
    split: str = "file",
    text_field: str = "text",
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """Documents of ranges of files, each of which begins and ends between documents; else as `read_documents`."""
    if split not in SPLITS:
        raise UserError(f"Documents are split by {' or '.join(SPLITS)}, not by {split!r}.")
    skipped = Skipped() if skipped is None else skipped
    for file, span in spans:
        try:
            yield from _documents_of(file, span, split, text_field, skipped)
        except compressed.DAMAGED:
            skipped.add(file.name, "damaged compression")
        except OSError as error:
            skipped.add(file.name, f"cannot be read: {error.strerror}")


def _documents_of(file: TextFile, span: Span, split: str, text_field: str, skipped: Skipped) -> Iterator[Document]:
    if not stat.S_ISREG(os.stat(file.path).st_mode):
        return skipped.add(file.name, "not a regular file")
    with compressed.open_bytes(file.path) if span.end is None else _open_range(file.path, span) as stream:
        if file.is_json_lines:
            yield from _json_lines(file.name, stream, span.line, text_field, skipped)
        elif split == "file":
            yield from _checked(file.name, stream.read(MAX_DOCUMENT_BYTES + 1), skipped)
        else:
            yield from _paragraphs(file.name, stream, span.line, skipped)


def _open_range(path: Path, span: Span) -> IO[bytes]:
    """The bytes of a span of an uncompressed file."""
    return cast(IO[bytes], io.BufferedReader(_Range(path, span), 1 << 18))


class _Range(io.RawIOBase):
    def __init__(self, path: Path, span: Span) -> None:
        assert span.end is not None
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._file.seek(span.start)
        self._left = span.end - span.start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _checked(name: str, data: bytes, skipped: Skipped) -> Iterator[Document]:
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


def _paragraphs(name: str, stream: IO[bytes], number: int, skipped: Skipped) -> Iterator[Document]:
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
    yield from _checked(name, b"".join(lines).rstrip(b"\r\n"), skipped)


def _json_lines(name: str, stream: IO[bytes], number: int, text_field: str, skipped: Skipped) -> Iterator[Document]:
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > MAX_DOCUMENT_BYTES:
            skipped.add(where, f"a line larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
        elif line.strip():
            yield from _json_document(where, line, text_field, skipped)


def _json_document(where: str, line: bytes, text_field: str, skipped: Skipped) -> Iterator[Document]:
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
