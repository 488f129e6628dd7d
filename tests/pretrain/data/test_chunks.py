"""Damaged and hostile shards: each is refused with the shard, the chunk and the mend, before any of its tokens is used.

Every hostile file carries something that would leave a mark if any reader executed it, followed it or unpacked it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.chunks import Chunks
from pretrain.data.manifest import Manifest
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.data.corpus import many_tokens, write_source

SHARD, STRIDE = "shard-00001.tar", 1024  # chunks 4 to 7, in blocks of 512: a header and 130 bytes


def read_all(folder: Path) -> None:
    stream = Stream([folder], 16, seed=1, shuffle=False)
    try:
        stream.read(np.arange(stream.samples_per_epoch))
    finally:
        stream.close()


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_all(folder)
    return str(error.value)


def change(path: Path, start: int, data: bytes) -> None:
    """Bytes written over those at `start`; the size stays."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def of_size(data: bytes, size: int) -> bytes:
    return data[:size].ljust(size, b"\0")


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("chunk", [4, 7])
@pytest.mark.parametrize("place", [0, 129])
def test_one_flipped_bit_is_noticed(source: Path, bit: int, chunk: int, place: int) -> None:
    start = (chunk - 4) * STRIDE + 512 + place
    byte = (source / SHARD).read_bytes()[start]
    change(source / SHARD, start, bytes([byte ^ 1 << bit]))
    message = refusal(source)
    assert f"{source / SHARD}, chunk {chunk}: its bytes were altered: the SHA-256 is not the recorded one" in message
    assert "Restore the file" in message and "prepare the data again" in message


@pytest.mark.parametrize("place", range(0, 512, 37))
def test_any_other_byte_of_a_header_is_noticed(source: Path, place: int) -> None:
    byte = (source / SHARD).read_bytes()[STRIDE + place]
    change(source / SHARD, STRIDE + place, bytes([byte ^ 0x20]))
    assert f"{source / SHARD}, chunk 5: " in refusal(source)


@pytest.mark.parametrize(("size", "chunk"), [(0, 4), (300, 4), (STRIDE, 5), (2 * STRIDE + 600, 6), (9_999, None)])
def test_a_shard_cut_short_names_the_first_missing_chunk_even_between_members(
    source: Path, size: int, chunk: int | None
) -> None:
    os.truncate(source / SHARD, size)
    message = refusal(source)
    where = f"Chunk {chunk}: " if chunk is not None else ""
    assert message.startswith(f"{where}{source / SHARD} was cut short: it has {size:,} bytes, not 10,240.")


def test_a_shard_that_is_cut_while_it_is_read_is_refused(source: Path) -> None:
    stream = Stream([source], 16, seed=1, shuffle=False)
    stream.read(np.arange(17))  # the shard is open now
    os.truncate(source / SHARD, STRIDE + 100)
    with pytest.raises(UserError, match=r"shard-00001.tar, chunk 5: the file was cut short"):
        stream.read(np.arange(20, 24))


def test_a_longer_shard_and_swapped_shards_are_refused(source: Path) -> None:
    with (source / SHARD).open("ab") as file:
        file.write(b"\0" * 512)
    assert "is too long: it has 10,752 bytes" in refusal(source)
    (source / "shard-00002.tar").replace(source / SHARD)
    (source / "shard-00002.tar").write_bytes((source / SHARD).read_bytes())
    assert f"{source / SHARD}, chunk 4: the member is named '00000008.tok', not '00000004.tok'" in refusal(source)


@pytest.mark.parametrize("name", [SHARD, "shard-00002.sha256", "manifest.json", "tokenizer.model"])
def test_a_missing_file_is_named(source: Path, name: str) -> None:
    (source / name).unlink()
    assert f"{source / name}" in refusal(source)


def test_an_altered_sidecar_is_refused(source: Path) -> None:
    change(source / "shard-00001.sha256", 5, b"x")
    message = refusal(source)
    assert f"{source / 'shard-00001.sha256'} (the hashes of {SHARD}) was altered" in message


def test_a_chunk_and_its_hash_altered_together_are_refused(source: Path) -> None:
    """The sidecar's own hash stands in the manifest, whose hash is the run's."""
    values = b"\1" * 130
    change(source / SHARD, 512, values)
    change(source / "shard-00001.sha256", 0, hashlib.sha256(values).digest())
    assert "was altered" in refusal(source)


@pytest.mark.parametrize("name", [SHARD, "shard-00001.sha256"])
def test_links_are_not_followed(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).rename(tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    assert f"{source / name} is not a plain file (links are not followed)" in refusal(source)


def test_a_link_that_comes_after_the_check_is_not_followed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chunks, "_check_shard", lambda self, number: None)
    (source / SHARD).rename(source / "elsewhere")
    (source / SHARD).symlink_to(source / "elsewhere")
    assert f"Cannot open {source / SHARD}: Too many levels of symbolic links" in refusal(source)


def test_a_pipe_in_a_shards_place_does_not_hang(source: Path) -> None:
    (source / SHARD).unlink()
    os.mkfifo(source / SHARD)
    assert "is not a plain file" in refusal(source)


def test_a_command_in_a_folders_place_is_not_run(tmp_path: Path) -> None:
    for url in (f"pipe:touch {tmp_path}/ran", f"pipe://touch {tmp_path}/ran", f"ssh://host/;touch {tmp_path}/ran"):
        assert re.search(r"never by (pipe|ssh): or from commands", refusal(Path(url)))
    assert "named by its plain path" in refusal(Path("file:///etc"))
    assert list(tmp_path.iterdir()) == []


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = many_tokens(1000, tokenizer.vocab_size)
    tokens[300] = tokenizer.vocab_size
    folder = write_source(tmp_path / "s", tokens, tokenizer, 64, 4)
    size = tokenizer.vocab_size
    assert f"shard-00001.tar, chunk 4: it holds the id {size}, and the vocabulary has {size}" in refusal(folder)


# -- files that would harm a reader that executes, follows or unpacks --------------------------------------------------


class Mark:
    """Unpickled, it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def tar_of(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, link: str = "", tar_format: int = 0) -> bytes:
    """A tar of one member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format or tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size, member.type, member.linkname = len(data) if kind == tarfile.REGTYPE else 0, kind, link
        tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def huge_header() -> bytes:
    """A member that declares 8 GiB - 1."""
    member = tarfile.TarInfo("00000004.tok")
    member.size = (8 << 30) - 1
    return member.tobuf(tarfile.USTAR_FORMAT)


def sparse_header() -> bytes:
    """A GNU sparse member of 8 GiB on nothing."""
    member = tarfile.TarInfo("00000004.tok")
    member.type = tarfile.GNUTYPE_SPARSE
    return member.tobuf(tarfile.GNU_FORMAT)


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a pickle": (lambda mark: tar_of("00000004.pyd", pickle.dumps(Mark(mark))), "named '00000004.pyd'"),
    "a torch file": (lambda mark: tar_of("00000004.pth", pickle.dumps(Mark(mark))), "named '00000004.pth'"),
    "a bare pickle": (lambda mark: pickle.dumps(Mark(mark)), "no tar header"),
    "no token array": (lambda mark: tar_of("00000004.txt", b"text"), "no array of tokens"),
    "an object array": (lambda mark: tar_of("00000004.npy", npy_of(Mark(mark))), "named '00000004.npy'"),
    "a pickle in the array's place": (lambda mark: tar_of("00000004.tok", pickle.dumps(Mark(mark))), "size is not 130"),
    "a symbolic link": (lambda _: tar_of("00000004.tok", b"", tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link"),
    "a hard link": (lambda _: tar_of("00000004.tok", b"", tarfile.LNKTYPE, "/etc/passwd"), "a hard link"),
    "a way out": (lambda mark: tar_of(f"../../{mark.name}", b"x" * 130), "is named '../../mark'"),
    "an absolute name": (lambda mark: tar_of(str(mark), b"x" * 130), "is named '/"),
    "a pax header": (lambda _: tar_of("ü" * 120, b"x", tar_format=tarfile.PAX_FORMAT), "a pax header"),
    "a sparse file": (lambda _: sparse_header(), "a sparse file"),
    "a huge member": (lambda _: huge_header(), "size is not 130"),
    "a gzip stream": (lambda mark: gzip.compress(tar_of("00000004.tok", b"\0" * 130)), "the file is compressed"),
    "a zstd stream": (lambda _: b"\x28\xb5\x2f\xfd" + b"\0" * 100, "the file is compressed"),
    "a bzip stream": (lambda _: b"BZh9" + b"\0" * 100, "the file is compressed"),
    "zeros": (lambda _: b"", "no tar header"),
    "terminal commands": (lambda _: tar_of("\x1b]0;title\x07", b"x"), r"named '\x1b]0;title\x07'"),
}


def npy_of(value: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([value], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_shards_are_refused_and_execute_nothing(source: Path, tmp_path: Path, kind: str) -> None:
    make, words = HOSTILE[kind]
    mark = tmp_path / "mark"
    (source / SHARD).write_bytes(of_size(make(mark), 10_240))
    before = set(tmp_path.rglob("*"))
    message = refusal(source)
    assert message.startswith(f"{source / SHARD}, chunk 4: ") and words in message
    assert message.isprintable()
    assert set(tmp_path.rglob("*")) == before and not mark.exists()


def test_memory_of_a_chunk_is_used_again_but_never_while_someone_has_its_tokens(source: Path) -> None:
    manifest = Manifest.load(source)
    chunks = Chunks(manifest, cache_bytes=1)  # of one chunk
    other = Chunks(manifest)
    first = chunks.tokens(0, 3, 20)
    expected = first.tolist()
    places = set()
    for chunk in range(1, 15):
        assert chunks.tokens(chunk, 0, 65).tolist() == other.tokens(chunk, 0, 65).tolist()
        places.add(chunks.tokens(chunk, 0, 65).__array_interface__["data"][0])
    assert len(places) == 2, "of the newest chunk and the one before it"
    assert first.tolist() == expected
    assert first.__array_interface__["data"][0] - 6 not in places
