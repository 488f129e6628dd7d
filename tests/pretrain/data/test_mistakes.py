"""What users and their files get wrong, through the command line: one message, exit code 2, no traceback, nothing left."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.distributed import REPOSITORY, run_python
from tests.pretrain.data.corpus import hashes, quietly, read_with_webdataset, stdlib_texts, write_texts

Make = Callable[[Path], None]


STRICT = {"PYTHONIOENCODING": "utf-8:strict"}  # as under most locales; under C anything can be printed


def nothing(_: Path) -> None:
    """Leave the folder as it is."""


def write(name: str, data: bytes) -> Make:
    return lambda folder: (folder / name).write_bytes(data) and None


# what is made in the folder, arguments (in that folder), and what the message must say
MISTAKES: dict[str, tuple[Make, list[str], list[str]]] = {
    "missing corpus": (nothing, ["none.txt"], ["There is no file or folder none.txt"]),
    "no corpus": (nothing, [], ["There is no text to prepare: name files or folders, - for standard input"]),
    "empty corpus": (write("a.txt", b" \n"), ["a.txt"], ["The corpus is empty", "(1 empty, such as a.txt)"]),
    "empty folder": (nothing, ["."], ["The folders hold no text files"]),
    "binary, strict": (write("a.txt", b"a\0b"), ["a.txt", "--strict"], ["a.txt: binary", "without --strict"]),
    "all binary": (
        write("a.txt", b"a\0b"),
        ["a.txt"],
        ["The corpus is empty", "1 binary (holds a zero byte), such as a.txt"],
    ),
    "wrong encoding, strict": (write("a.txt", b"\xe9t\xe9"), ["a.txt", "--strict"], ["a.txt: not UTF-8 text"]),
    "damaged gz, strict": (
        write("a.txt.gz", gzip.compress(os.urandom(999))[:-99]),
        ["a.txt.gz", "--strict"],
        ["a.txt.gz: damaged compression"],
    ),
    "damaged zst": (
        write("a.jsonl.zst", zstandard.compress(os.urandom(999))[:-99]),
        ["a.jsonl.zst"],
        ["1 damaged compression, such as a.jsonl.zst"],
    ),
    "vocabulary too large": (
        write("a.txt", b"few words in a text " * 9),
        ["a.txt", "--vocab-size", "9999", "--validation", "0"],
        ["A vocabulary of 9999 is larger than this text supports: the largest that works is "],
    ),
    "no tokenizer": (
        write("a.txt", b"text"),
        ["a.txt", "--tokenizer", "a.txt", "--validation", "0"],
        ["a.txt is no WordPiece vocabulary: it has no [UNK], [CLS], [SEP]"],
    ),
    "no SentencePiece model": (
        write("a.bin", b"text"),
        ["a.bin", "--tokenizer", "a.bin", "--validation", "0"],
        ["a.bin is not a SentencePiece model"],
    ),
    "two ways to a tokenizer": (
        write("a.txt", b"text"),
        ["a.txt", "--tokenizer", "t.model", "--vocab-size", "9", "--validation", "7"],
        ["not both", "--validation is a share from 0 to below 1, not 7.0"],
    ),
    "standard input twice": (nothing, ["-", "-"], ["- stands for standard input and can be named once"]),
    "a file in the way": (write("out", b"mine"), ["out"], ["out exists and is not an empty folder"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_prepare_is_one_message(tmp_path: Path, mistake: str) -> None:
    make, arguments, words = MISTAKES[mistake]
    make(tmp_path)
    before = hashes(tmp_path)
    result = run_python(["pretrain", "prepare", *arguments, "--out", "out", "--processes", "1"], cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert result.stderr.count("error: ") == 1
    message = result.stderr[result.stderr.index("error: ") :]
    assert all(part in message for part in words), message
    assert hashes(tmp_path) == before
    assert [path.name for path in tmp_path.glob(".*")] == []


def flip(folder: Path) -> None:
    data = bytearray((folder / "shard-00000.tar").read_bytes())
    data[600] ^= 1
    (folder / "shard-00000.tar").write_bytes(data)


DAMAGE: dict[str, tuple[Make, list[str]]] = {
    "cut short": (
        lambda folder: os.truncate(folder / "shard-00000.tar", 5000),
        ["Chunk 1: source/shard-00000.tar was cut short: it has 5,000 bytes, not ", "prepare the data again"],
    ),
    "altered": (flip, ["source/shard-00000.tar, chunk 0: its bytes were altered", "Restore the file"]),
    "no index": (
        lambda folder: (folder / "manifest.json").unlink(),
        ["source: neither a run's folder", "nor a folder of shards (manifest.json)"],
    ),
    "no sidecar": (
        lambda folder: (folder / "shard-00000.sha256").unlink(),
        ["source/shard-00000.sha256 is missing or unreadable: No such file or directory", "Restore the file"],
    ),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.model").write_bytes(b"another") and None,
        ["source/tokenizer.model is not the tokenizer of these shards", "put back the one that prepare wrote"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shards_are_one_message(tmp_path: Path, model_file: Path, damage: str) -> None:
    texts = write_texts(tmp_path / "texts", stdlib_texts(1))
    quietly([texts], tmp_path / "out", tokenizer=model_file, validation=0, tokens_per_chunk=1024)
    (tmp_path / "out/train").rename(tmp_path / "source")
    make, words = DAMAGE[damage]
    make(tmp_path / "source")
    options = ["--sample", "0", "--seq-length", "1024", "--seed", str(seed_of_chunk_zero(tmp_path / "source"))]
    result = run_python(["pretrain", "inspect", "source", *options], cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in words), result.stderr


def seed_of_chunk_zero(folder: Path) -> int:
    """A seed whose first sample lies in the chunk that is damaged."""
    import json

    from pretrain.data.order import Order, Source

    try:
        tokens = json.loads((folder / "manifest.json").read_bytes())["tokens"]
    except FileNotFoundError:
        return 0
    source = Source((tokens - 1) // 1024, 1)
    return next(seed for seed in range(1000) if Order([source], seed).locate([0])[1][0] == 0)


def prepare_with_input(text: bytes, out: Path, model_file: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pretrain", "prepare", "-", "--out", str(out), "--tokenizer", str(model_file)]
    options = ["--validation", "0", "--split", "blank-line"]
    return subprocess.run([*command, *options], input=text, capture_output=True, cwd=REPOSITORY, timeout=60)


def test_standard_input_is_read_and_the_table_tells_what_was_done(
    tmp_path: Path, model_file: Path, tokenizer: object
) -> None:
    result = prepare_with_input(
        "erster Satz\n\nzweiter Sätz\n\nbad \0\n\nwith\u2581mark".encode(), tmp_path / "out", model_file
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.decode().splitlines()
    tokens = len(read_with_webdataset(tmp_path / "out/train"))
    row = next(line for line in lines if "train" in line)
    size = len("erster Satz" + "zweiter Sätz" + "with\u2581mark".encode().decode()) + 1 + 2
    assert [part.strip() for part in row.replace("│", "|").split("|")[1:-1]] == [
        "train",
        "3",
        str(tokens),
        str(size),
        f"{size / tokens:.2f}",
    ]
    assert "Vocabulary 400. Skipped: 1." in lines
    assert "  1 binary (holds a zero byte), such as standard input:5" in lines
    assert "1 documents do not decode to themselves, such as standard input:7" in lines
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "train"]


def test_names_that_are_no_utf8_are_reported_not_a_fault(tmp_path: Path, model_file: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name, data in ((b"\xe9.txt", b"a\0b"), (b"good-\xff.txt", b"good text"), (b"z\xe9.txt", "a\u2581b".encode())):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "texts"), name))).write_bytes(data)
    arguments = ["--tokenizer", model_file, "--validation", "0"]
    result = run_python(["pretrain", "prepare", tmp_path / "texts", "--out", tmp_path / "out", *arguments], env=STRICT)
    assert result.returncode == 0, result.stderr
    assert f"1 binary (holds a zero byte), such as {tmp_path}/texts/\\udce9.txt" in result.stdout
    assert f"such as {tmp_path}/texts/z\\udce9.txt" in result.stdout
