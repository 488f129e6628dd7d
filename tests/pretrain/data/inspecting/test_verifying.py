"""One pass names every kind of damage, wherever it is, and nothing else."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data.inspecting.counting import count
from pretrain.data.inspecting.verifying import verify
from pretrain.data.manifest import Manifest
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.data.corpus import many_tokens, write_source


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


STRIDE = 1024  # a header, and 65 tokens of two bytes padded to a block
DAMAGE: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "a token": (
        "shard-00001.tar",
        lambda p: flip(p, STRIDE + 512),
        ["chunk 5: its bytes were altered", "its SHA-256 is"],
    ),
    "a header": (
        "shard-00001.tar",
        lambda p: flip(p, 2 * STRIDE + 1),
        ["chunk 6: the member is named", "its SHA-256 is"],
    ),
    "what fills a block": ("shard-00001.tar", lambda p: flip(p, STRIDE - 1), ["shard-00001.tar: its SHA-256 is"]),
    "the end": ("shard-00001.tar", lambda p: flip(p, p.stat().st_size - 1), ["shard-00001.tar: its SHA-256 is"]),
    "a cut": ("shard-00001.tar", lambda p: os.truncate(p, 1500), ["shard-00001.tar has 1,500 bytes, not 10,240"]),
    "a missing shard": ("shard-00001.tar", os.unlink, ["shard-00001.tar is missing"]),
    "a hash": (
        "shard-00001.sha256",
        lambda p: flip(p, 40),
        ["shard-00001.sha256 (the hashes of shard-00001.tar) was alt"],
    ),
    "a link": (
        "shard-00001.tar",
        link,
        ["shard-00001.tar is missing or unreadable: Too many levels of symbolic links"],
    ),
    "a pipe": ("shard-00001.tar", pipe, ["shard-00001.tar is not a plain file"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_it_names(source: Path, kind: str) -> None:
    manifest = Manifest.load(source)
    assert list(verify(manifest)) == []
    name, damage, words = DAMAGE[kind]
    damage(source / name)
    found = list(verify(manifest))
    assert len(found) == len(words), found
    assert all(word in problem for word, problem in zip(words, found, strict=True)), found


def test_one_pass_names_all_of_it_and_reads_each_byte_once(source: Path) -> None:
    manifest = Manifest.load(source)
    flip(source / "shard-00000.tar", 512)
    flip(source / "shard-00000.tar", 3 * STRIDE + 512)
    (source / "shard-00001.tar").unlink()
    flip(source / "shard-00003.tar", 512)
    read: list[int] = []
    found = list(verify(manifest, read.append))
    assert [problem.removeprefix(f"{source}/")[:24] for problem in found] == [
        "shard-00000.tar, chunk 0",
        "shard-00000.tar, chunk 3",
        "shard-00000.tar: its SHA",
        "shard-00001.tar is missi",
        "shard-00003.tar, chunk 1",
        "shard-00003.tar: its SHA",
    ]
    assert sum(read) == sum(shard.bytes for shard in manifest.shards) - manifest.shards[1].bytes


@pytest.mark.parametrize("read", [lambda manifest: list(verify(manifest)), count], ids=["verify", "count"])
def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, tokenizer: Tokenizer, read: Callable[[Manifest], object]
) -> None:
    peaks = []
    for tokens in (200_000, 1_600_000):  # 0.4 and 3.2 MB
        folder = write_source(tmp_path / str(tokens), many_tokens(tokens, tokenizer.vocab_size), tokenizer, 8192, 16)
        manifest = Manifest.load(folder)
        tracemalloc.start()
        read(manifest)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000, peaks
