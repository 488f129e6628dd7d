"""webdataset shards made elsewhere: what is read of them, and everything that is not, with its reason."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from pretrain.data.documents import Document, Skipped, read_documents, text_files
from pretrain.data.foreign import tars as clean
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.data.corpus import ODD, stdlib_texts
from tests.pretrain.data.foreign.tars import member, packed, raw_header, write

END = bytes(1024)
GOOD = ("good.txt", b"good text")


def read(path: Path, tokenizer: Tokenizer | None = None, **options: Any) -> tuple[list[Document], Skipped]:
    skipped = Skipped()
    found = list(read_documents(text_files([path]), skipped=skipped, tokenizer=tokenizer, **options))
    return found, skipped


def texts(path: Path, tokenizer: Tokenizer | None = None, **options: Any) -> list[str]:
    found, skipped = read(path, tokenizer, **options)
    assert skipped.counts == {}
    return [document.text for document in found]


PACK = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", PACK)
def test_webdatasets_own_writer_is_read_whatever_the_compression(tmp_path: Path, suffix: str) -> None:
    """Its members carry a pax header each, for the fraction of a second of their time."""
    from webdataset.writer import TarWriter

    file = io.BytesIO()
    with TarWriter(file) as writer:
        for number, text in enumerate(ODD):
            writer.write({"__key__": f"part/{number:04d}", "txt": text, "json": {"text": "another"}})
    assert b"mtime=" in file.getvalue()
    path = write(tmp_path / f"a{suffix}", PACK[suffix](file.getvalue()))
    assert texts(path) == ODD
    assert [document.name for document in read(path)[0]][1] == f"{path}:part/0001.txt"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read(tmp_path: Path, tar_format: int) -> None:
    names = [f"./{'deep/' * depth}{depth}.TXT" for depth in range(12)]
    path = write(tmp_path / "a.tar", packed([(name, name.encode()) for name in names], tar_format))
    assert texts(path) == names


def test_a_tar_of_the_tar_program_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, text in enumerate(stdlib_texts(3)):
        (tmp_path / f"in/{number}.txt").write_text(text)
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(tmp_path / "in", "./")  # folders too
    assert sorted(texts(file)) == sorted(stdlib_texts(3))


def test_a_sample_gives_its_texts_else_lines_else_an_object(tmp_path: Path) -> None:
    record = json.dumps({"body": "of the object", "text": "another"}).encode()
    lines = b'{"body": "line one"}\n\n{"body": "line two"}\n'
    members = [("1.txt", b"one"), ("1.json", record), ("1.en.md", b"two"), ("1.jpg", b"x")]
    members += [("2.json", record), ("2.jsonl", lines), ("3.json", record), ("4.txt", b"last")]
    found, skipped = read(write(tmp_path / "a.tar", packed(members)), text_field="body")
    assert [document.text for document in found] == ["one", "two", "line one", "line two", "of the object", "last"]
    names = [document.name.partition(".tar:")[2] for document in found]
    assert names == ["1.txt", "1.en.md", "2.jsonl:1", "2.jsonl:3", "3.json", "4.txt"]
    assert skipped.counts == {"a member that is neither text nor tokens": 1}


@pytest.mark.parametrize("kind", ["npy", "tok", "bin"])
def test_tokens_are_documents_with_their_ids_where_the_tokenizer_is_named(
    tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    wanted = stdlib_texts(3)
    ids = [np.array(tokenizer.encode(text), "<u2") for text in wanted]
    joined = np.concatenate([part for of in ids[:2] for part in (of, [tokenizer.eos])]).astype("<u2")
    arrays = [joined, ids[2].astype("<i8" if kind == "npy" else "<u2")]
    members = [
        (f"{number}.{kind}", npy(array) if kind == "npy" else array.tobytes()) for number, array in enumerate(arrays)
    ]
    path = write(tmp_path / "a.tar", packed(members))
    found, skipped = read(path, tokenizer)
    assert [document.text for document in found] == wanted and skipped.counts == {}
    for document, its in zip(found, ids, strict=True):
        assert document.tokens is not None and document.tokens.dtype == np.dtype("<u2")
        assert document.tokens.tolist() == its.tolist()
    assert [document.name.partition(".tar:")[2] for document in found] == [f"0.{kind}#1", f"0.{kind}#2", f"1.{kind}"]
    without = read(path)
    assert without[0] == [] and without[1].counts == {
        "tokens, which are read where --tokenizer names their tokenizer": 2
    }


def test_another_id_can_end_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    ids = [60, 61, 1, 62, tokenizer.eos, 63, 1]
    path = write(tmp_path / "a.tar", packed([("a.tok", np.array(ids, "<u2").tobytes())]))
    found, _ = read(path, tokenizer, eos_id=1)
    assert [document.tokens.tolist() for document in found if document.tokens is not None] == [[60, 61], [62], [63]]
    beyond = write(tmp_path / "b.tar", packed([("a.tok", np.array([60, 9999, 61], "<u2").tobytes())]))
    assert len(read(beyond, tokenizer, eos_id=9999)[0]) == 2  # an end need not be an id of the tokenizer's
    with pytest.raises(
        UserError, match=r"b.tar:a.tok holds the id 9999, and the tokenizer's ids are 0 to 399: name by"
    ):
        read(beyond, tokenizer)


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def edited(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


ROW = npy(np.arange(3, dtype="<u2"))
ARRAYS: dict[str, tuple[str, bytes, str]] = {
    "an object array": ("a.npy", npy(np.array([{}])), "a .npy file that is not one row of whole numbers"),
    "fractions": ("a.npy", npy(np.ones(3)), "a .npy file that is not one row of whole numbers"),
    "two dimensions": ("a.npy", npy(np.ones((2, 2), "i4")), "a .npy file that is not one row of whole numbers"),
    "a header that is a program": (
        "a.npy",
        edited(ROW, b"{'descr': '<u2'", b"__import__('os'"),
        "a .npy file that is not one row of whole numbers",
    ),
    "more than it has": ("a.npy", edited(ROW, b"(3,)", b"(9,)"), "a .npy file whose size is not the declared one"),
    "less than it has": ("a.npy", edited(ROW, b"(3,)", b"(1,)"), "a .npy file whose size is not the declared one"),
    "a header of 4 GiB": (
        "a.npy",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        "a .npy file that is not one row of whole numbers",
    ),
    "another version": ("a.npy", edited(ROW, b"NUMPY\x01", b"NUMPY\x07"), "not a .npy file"),
    "a pickle named .npy": ("a.npy", pickle.dumps({}), "not a .npy file"),
    "half a number": ("a.tok", b"123", "tokens whose bytes are no multiple of 2"),
}


@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_that_are_none_are_skipped(tmp_path: Path, tokenizer: Tokenizer, what: str) -> None:
    name, data, reason = ARRAYS[what]
    path = write(tmp_path / "a.tar", packed([(name, data), GOOD]))
    found, skipped = read(path, tokenizer)
    assert [document.text for document in found] == ["good text"]
    assert (skipped.counts, skipped.examples) == ({reason: 1}, {reason: [f"{path}:{name}"]})


NEVER = "a member that only a program could decode (pickle, torch, CBOR): never opened"
SKIPPED: dict[str, tuple[bytes, str]] = {
    **{f"a .{kind}": (packed([(f"a.{kind}", b"x" * 9), GOOD]), NEVER) for kind in sorted(clean.NEVER_DECODED)},
    "a picture": (packed([("a.jpg", b"x"), GOOD]), "a member that is neither text nor tokens"),
    "no suffix": (packed([("README", b"x"), GOOD]), "a member that is neither text nor tokens"),
    "an empty member": (packed([("a.txt", b""), GOOD]), "an empty member"),
    "a program of Linux": (packed([("a.txt", b"\x7fELF\2\1"), GOOD]), "an executable"),
    "a program of Windows": (packed([("a.md", b"MZ\x90\0\3"), GOOD]), "an executable"),
    "a script": (packed([("a.txt", b"#!/bin/sh\nrm -r /"), GOOD], mode=0o755), "an executable"),
    "no text": (packed([("a.txt", b"a\0b"), GOOD]), "binary (holds a zero byte)"),
    "no UTF-8": (packed([("a.txt", b"\xff"), GOOD]), "not UTF-8 text"),
    "no object": (packed([("a.json", b"[]"), GOOD]), "not a JSON object"),
    "no field": (packed([("a.json", b"{}"), GOOD]), "without a text field 'text'"),
    "a way out": (packed([("../../a.txt", b"x"), GOOD]), "a member name that leads out of its folder"),
    "a way out inside": (packed([("a/../../../b.txt", b"x"), GOOD]), "a member name that leads out of its folder"),
    "an absolute name": (packed([("/etc/a.txt", b"x"), GOOD]), "an absolute member name"),
    "a name of Windows": (packed([("C:a.txt", b"x"), GOOD]), "an absolute member name"),
    "commands of a terminal": (packed([("\x1b]0;x\x07.txt", b"x"), GOOD]), "a member name that is none"),
    "no name": (member(name="", size=b"00000000005\0") + packed([GOOD]), "a member name that is none"),
    "an empty folder": (packed([("a//b.txt", b"x"), GOOD]), "a member name that is none"),
    "a backslash": (packed([("a\\\\b.txt", b"x"), GOOD]), "an absolute member name"),
    **{
        f"kind {kind!r}": (raw_header(size=b"00000000000\0", kind=kind) + packed([GOOD]), reason)
        for kind, reason in {
            b"1": "a hard link",
            b"2": "a symbolic link",
            b"3": "a character device",
            b"4": "a block device",
            b"6": "a named pipe",
            b"Q": "a member of an unknown kind",
        }.items()
    },
    "a pax name": (
        packed([("ü.txt", b"x")], tarfile.PAX_FORMAT, end=False) + packed([GOOD]),
        "a member that a pax header renames or resizes",
    ),
    "a GNU name": (
        packed([("x" * 150 + ".txt", b"x")], tarfile.GNU_FORMAT, end=False) + packed([GOOD]),
        "a member of a GNU long name",
    ),
    "a name twice": (packed([("good.txt", b"good text"), ("good.TXT", b"y")]), "a second member of one name"),
}


@pytest.mark.parametrize("what", SKIPPED)
def test_a_member_that_is_not_wanted_is_skipped_with_its_reason(tmp_path: Path, what: str) -> None:
    data, reason = SKIPPED[what]
    path = write(tmp_path / "a.tar", data)
    found, skipped = read(path)
    assert ([document.text for document in found], skipped.counts) == (["good text"], {reason: 1})
    with pytest.raises(UserError) as error:
        list(read_documents(text_files([path]), skipped=Skipped(strict=True)))
    assert str(error.value).startswith(f"{path}:") and str(error.value).isprintable()
    assert str(error.value).endswith(f": {reason} (without --strict it would be skipped and counted).")


def test_a_name_that_is_no_utf8_is_none_unless_its_bytes_are_written_out(tmp_path: Path) -> None:
    header = bytearray(raw_header())
    header[:5] = b"\xe9.txt"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = write(tmp_path / "a.tar", bytes(header) + b"text\n".ljust(512, b"\0") + END)
    assert read(path)[1].counts == {"an absolute member name": 1}  # a backslash stands for the byte


def user(field: bytes) -> bytes:
    """A member whose user has such a number."""
    header = bytearray(raw_header())
    header[108:116], header[148:156] = field, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"text\n".ljust(512, b"\0")


ONE = packed([("first.txt", b"first")], end=False)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "cut between members": (ONE, "a tar cut short: it has no end"),
    "cut inside a header": (ONE + ONE[:100], "a tar cut short in a header"),
    "cut inside a member": (
        ONE + raw_header(size=b"00000001000\0") + b"x" * 100,
        "a member that declares more bytes than the file has",
    ),
    "text": (ONE + b"no tar at all" * 99, "no tar header where a member should begin"),
    "no magic": (ONE + member(magic=b"\0" * 8) + END, "no tar header where a member should begin"),
    "a wrong checksum": (ONE + member()[:150].ljust(512, b"0") + END, "no tar header where a member should begin"),
    "another size": (
        ONE + edited(raw_header(), b"00000000005", b"00000000006") + b"x" * 512 + END,
        "a tar header with a wrong checksum",
    ),
    "no number": (ONE + member(size=b"0000000000x\0") + END, "a tar header with a number that is none"),
    "digits behind a zero byte": (
        ONE + member(size=b"\x0000000000005") + END,
        "a tar header with a number that is none",
    ),
    "no number of a user": (ONE + user(b"00x0000\0") + END, "a tar header with a number that is none"),
    "a negative size": (ONE + member(size=b"\xff" * 12) + END, "a tar header with a number that is none"),
    "a terabyte": (
        ONE + member(size=b"\x80" + (1 << 40).to_bytes(11, "big")) + END,
        "a member that declares more bytes than the file has",
    ),
    "8 GiB": (ONE + member(size=b"77777777777\0") + END, "a member that declares more bytes than the file has"),
    "a sparse file": (ONE + member(kind=b"S") + END, "a sparse file in a tar"),
    "a link with data": (ONE + member(kind=b"2") + END, "a link, device or folder that declares data"),
    "a pax header of all": (
        ONE + member(b"12 path=abc\n", kind=b"g", size=b"00000000014\0") + END,
        "a pax header that renames or resizes all members",
    ),
    "a pax header that is none": (
        ONE + member(b"999 mtime=1\n", kind=b"x", size=b"00000000014\0") + END,
        "a pax header that is none",
    ),
    "a pax header of a MiB": (
        ONE + member(b"x" * (1 << 20), kind=b"x", size=b"00004000000\0") + END,
        "a tar header that is extended by more than 64 KiB",
    ),
    "more behind the end": (ONE + END + b"x" * 512, "a tar with more behind its end"),
    "nothing": (b"", "a tar cut short: it has no end"),
    "gzip in a plain name": (gzip.compress(ONE), "a tar cut short in a header"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_behind_what_cannot_be_trusted_nothing_is_read(tmp_path: Path, what: str) -> None:
    data, reason = DAMAGED[what]
    path = write(tmp_path / "a.tar", data)
    found, skipped = read(path)
    assert [document.text for document in found] == ["first"] * data.startswith(ONE)
    assert (skipped.counts, skipped.examples) == ({reason: 1}, {reason: [str(path)]})


def test_a_cut_compressed_tar_is_noticed(tmp_path: Path) -> None:
    data = gzip.compress(packed([("first.txt", b"first"), ("second.txt", os.urandom(9000))]), mtime=0)
    found, skipped = read(write(tmp_path / "a.tar.gz", data[:-2000]))
    assert [document.text for document in found] == ["first"] and skipped.counts == {"damaged compression": 1}


@pytest.mark.parametrize("bit", range(0, 8 * 512, 61))
def test_no_flipped_bit_of_a_header_gives_another_document(tmp_path: Path, bit: int) -> None:
    data = bytearray(packed([("a.txt", b"first"), ("b.txt", b"second")]))
    data[bit // 8] ^= 1 << bit % 8
    assert read(write(tmp_path / "a.tar", bytes(data)))[0] == []


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jpg"])
def test_a_bomb_ends_at_its_limit(tmp_path: Path, suffix: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "BOMB_BYTES", 16 << 20)
    size = 1 << 33
    head = raw_header(name, b"%011o\0" % (size - 1))
    path = write(tmp_path / f"a{suffix}", PACK[suffix](ONE + head + bytes(96 << 20)))
    tracemalloc.start()
    begin = time.process_time()
    found, skipped = read(path)
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.text for document in found] == ["first"]
    limit = "more than 64 MiB, or 1,024 members, of one sample"
    expected = {"a compressed tar of more than 200 times its size": 1}
    assert skipped.counts == expected | (
        {limit: 1} if name == "a.txt" else {"a member that is neither text nor tokens": 1}
    )
    assert peak < 48 << 20 and seconds < 5


def test_a_million_empty_members_end_early(tmp_path: Path) -> None:
    packer, members = zstandard.ZstdCompressor().compressobj(), raw_header("a.txt", b"00000000000\0") * 1000
    data = [packer.compress(members) for _ in range(1000)]
    path = write(tmp_path / "a.tar.zst", b"".join([*data, packer.flush()]))
    begin = time.process_time()
    found, skipped = read(path)
    assert found == [] and time.process_time() - begin < 2
    assert skipped.counts == {"an empty member": 1 << 14, "more than 16,384 empty members one after the other": 1}


def test_a_sample_is_bounded_but_a_shard_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "MAX_SAMPLE_BYTES", 1 << 20)
    members = [(f"{number}.txt", b"x" * 600_000) for number in range(8)]
    assert len(texts(write(tmp_path / "a.tar", packed(members)))) == 8
    together = [(f"0.{number}.txt", b"x" * 600_000) for number in range(8)]
    found, skipped = read(write(tmp_path / "b.tar", packed(together)))
    assert len(found) == 1 and sum(skipped.counts.values()) == 7


def test_names_that_look_like_other_formats_change_nothing(tmp_path: Path) -> None:
    """Python's tarfile tells compression by a file's first bytes, which are a member's name."""
    for name in ("BZh91AY&SY.txt", "__meta__.txt", "__key__.txt", "a.__key__.txt", "a.__url__.txt"):
        assert texts(write(tmp_path / "a.tar", packed([(name, b"text")]))) == ["text"], name


def test_our_own_shards_are_not_read_as_tokens_again(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{source} holds shards that prepare wrote: name it as data.train as it is."):
        read(source)
    path = write(tmp_path / "a.tar", (source / "shard-00000.tar").read_bytes())
    with pytest.raises(
        UserError, match=f"{path} is a shard that prepare wrote: name its folder as data.train as it is."
    ):
        read(path, tokenizer)
