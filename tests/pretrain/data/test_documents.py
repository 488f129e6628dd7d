"""Documents from files of every kind; what is no text is skipped with its reason, and nothing is unpacked without bound."""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from pretrain.data import documents as module
from pretrain.data.documents import Skipped, read_documents, stdlib_corpus, text_files
from pretrain.errors import UserError
from tests.pretrain.data.corpus import ODD

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.compress(data),
}


def read(path: Path | list[Path], split: str = "file", field: str = "text") -> tuple[list[str], Skipped]:
    skipped = Skipped()
    found = read_documents(text_files(path if isinstance(path, list) else [path]), split, field, skipped)
    return [document.text for document in found], skipped


@pytest.mark.parametrize("suffix", PACK)
def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    for number, text in enumerate(ODD):
        path = tmp_path / f"{number}.txt{suffix}"
        path.write_bytes(PACK[suffix](text.encode()))
        assert read(path) == ([text], Skipped())


@pytest.mark.parametrize("suffix", PACK)
def test_json_lines_give_a_document_a_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    lines = [json.dumps({"body": text, "text": "another", "n": 1}) for text in ODD]
    path.write_bytes(PACK[suffix]("\n\n".join(lines).encode()))
    assert read(path, field="body") == (ODD, Skipped())
    assert read(path)[0] == ["another"] * len(ODD)


def test_json_lines_may_escape_what_a_file_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_bytes(b'{"text": "nul \\u0000 and \\ud83d\\ude00"}\n')
    assert read(path)[0] == ["nul \0 and \U0001f600"]


def test_blank_lines_split_a_text_into_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n \t\none\n  two\n\n\n\r\nthree\r\nfour\r\n \nfive")
    assert read(path, split="blank-line")[0] == ["one\n  two", "three\r\nfour", "five"]
    names = [document.name for document in read_documents(text_files([path]), "blank-line")]
    assert names == [f"{path}:{line}" for line in (3, 8, 11)]


def test_a_folder_gives_its_text_files_in_one_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/b.md.gz", "a.json", ".hidden.txt", ".git/x.txt", "x.bin", "noend", "C.TXT"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"text")
    assert [file.name for file in text_files([tmp_path])] == [
        f"{tmp_path}/{name}" for name in ("C.TXT", "a.json", "a/b.md.gz", "a/z.py", "b.txt")
    ]
    both = text_files([tmp_path / "x.bin", tmp_path / "a"])  # a named file whatever its suffix
    assert [file.path.name for file in both] == ["x.bin", "b.md.gz", "z.py"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"a\0b", "binary (holds a zero byte)"),
        ("a.txt", b"caf\xe9", "not UTF-8 text"),
        ("a.txt", "text".encode("utf-16"), "encoded as UTF-16, not UTF-8"),
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t\r\n", "empty"),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-12], "damaged compression"),
        ("a.txt.gz", b"no gzip at all", "damaged compression"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-8] + b"\0" * 8, "damaged compression"),
        ("a.txt.zst", zstandard.compress(os.urandom(5000))[:-100], "damaged compression"),
        ("a.txt.zst", b"no zstandard at all", "damaged compression"),
        ("a.jsonl", b"{not json}", "not a JSON object"),
        ("a.jsonl", b"[1, 2]", "not a JSON object"),
        ("a.jsonl", b"[" * 100_000, "not a JSON object"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "not a JSON object"),
        ("a.jsonl", b"\xff\xfe{}", "not a JSON object"),
        ("a.jsonl", b'{"txt": "x"}', "without a text field 'text'"),
        ("a.jsonl", b'{"text": 5}', "without a text field 'text'"),
        ("a.jsonl", b'{"text": " "}', "empty"),
        ("a.jsonl", b'{"text": "\\ud800"}', "holds half a surrogate pair, which UTF-8 cannot write"),
    ],
)
def test_what_is_no_text_is_counted_with_its_reason_or_stops_when_strict(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    bad, good = tmp_path / name, tmp_path / "good.txt"
    bad.write_bytes(data)
    good.write_bytes(b"good")
    texts, skipped = read([bad, good])
    where = f"{bad}:1" if name.endswith(".jsonl") else str(bad)
    assert texts == ["good"]
    assert (skipped.counts, skipped.examples) == ({reason: 1}, {reason: [where]})
    with pytest.raises(UserError) as error:
        list(read_documents(text_files([bad, good]), skipped=Skipped(strict=True)))
    assert str(error.value) == f"{where}: {reason} (without --strict it would be skipped and counted)."


def test_lines_before_a_damaged_end_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = b"".join(json.dumps({"text": f"line {n} {os.urandom(40).hex()}"}).encode() + b"\n" for n in range(3000))
    path.write_bytes(gzip.compress(lines, mtime=0)[:-2000])
    texts, skipped = read(path)
    assert 2000 < len(texts) < 3000 and texts[0].startswith("line 0 ")
    assert skipped.counts == {"damaged compression": 1} and skipped.examples["damaged compression"] == [str(path)]


def test_pipes_dangling_links_and_folders_of_text_names_are_no_documents(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c.txt").mkdir()
    texts, skipped = read(tmp_path)
    assert texts == []
    assert skipped.counts == {"not a regular file": 1, "cannot be read: No such file or directory": 1}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_skipped_within_the_limit_of_a_document(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1 << 20)
    bomb = tmp_path / f"bomb.txt{suffix}"
    bomb.write_bytes(PACK[suffix](b"a" * (64 << 20)))
    lines = tmp_path / f"lines.jsonl{suffix}"
    lines.write_bytes(PACK[suffix](b"a" * (16 << 20) + b'\n{"text": "after it"}\n'))
    tracemalloc.start()
    texts, skipped = read([bomb, lines])
    split = read(bomb, split="blank-line")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["after it"] and split[0] == []
    reasons = [
        "a document larger than 1 MiB (split a file of many by blank-line)",
        "a line larger than 1 MiB",
        "a paragraph larger than 1 MiB",
    ]
    assert [*skipped.counts, *split[1].counts] == reasons
    assert peak < 48 << 20  # zstandard may give 16 MiB at once; two of these, and a copy


def test_frames_of_zstandard_one_after_the_other_are_one_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(zstandard.compress(part) for part in (b"one ", b"", b"two" * 9000)))
    assert read(path)[0] == ["one " + "two" * 9000]


def test_a_source_that_does_not_exist_or_a_split_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"There is no file or folder {tmp_path}/none to read text from"):
        text_files([tmp_path / "none"])
    with pytest.raises(UserError, match="split by file or blank-line, not by 'line'"):
        list(read_documents([], "line"))


def test_the_embedded_corpus_is_the_standard_library_without_tests_packages_and_tables() -> None:
    files = stdlib_corpus()
    folder = Path(sysconfig.get_paths()["stdlib"])
    size = sum(file.path.stat().st_size for file in files)
    assert 10e6 < size < 20e6
    inner = [file.path.relative_to(folder).parts for file in files]
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    assert not [parts for parts in inner if left_out & set(parts)]
    assert {("argparse.py",), ("asyncio", "events.py")} <= set(inner)
    assert all(file.name == f"stdlib/{'/'.join(parts)}" for file, parts in zip(files, inner, strict=True))
