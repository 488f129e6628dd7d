"""Shards as bytes: the layout that is documented, read by programs that know nothing of ours."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import shards as layout
from pretrain.data.manifest import Manifest
from pretrain.data.shards import ShardWriter
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.data.corpus import many_tokens, read_with_tarfile, read_with_webdataset, write_source

# Any of these would make tar files of the same tokens differ by clock, user or machine.
FIXED = {"mtime": 0, "mode": 0o444, "uid": 0, "gid": 0, "uname": "pretrain", "gname": "pretrain", "linkname": ""}


@pytest.mark.parametrize(
    ("count", "size", "per_shard"),
    [(1000, 64, 4), (1000, 64, 512), (257, 64, 4), (258, 64, 4), (66, 64, 1), (2, 64, 1)],
)
def test_any_tar_program_reads_the_tokens_back(
    tmp_path: Path, tokenizer: Tokenizer, count: int, size: int, per_shard: int
) -> None:
    tokens = many_tokens(count, tokenizer.vocab_size)
    folder = write_source(tmp_path / "s", tokens, tokenizer, size, per_shard)
    chunks = -(-(count - 1) // size)
    assert len(list(folder.glob("*.tar"))) == -(-chunks // per_shard)
    assert np.array_equal(read_with_tarfile(folder), tokens)
    assert np.array_equal(read_with_webdataset(folder), tokens)


def test_members_lie_at_one_stride_behind_the_documented_header(source: Path, tokenizer: Tokenizer) -> None:
    tokens = many_tokens(1000, tokenizer.vocab_size).astype("<u2")
    chunk = 0
    for path in sorted(source.glob("*.tar")):
        data = path.read_bytes()
        with tarfile.open(path, "r:") as tar:
            for place, member in enumerate(tar.getmembers()):
                values = tokens[64 * chunk : 64 * chunk + 65].tobytes()
                assert member.name == f"{chunk:08d}.tok"
                assert (member.type, member.size, member.pax_headers) == (tarfile.REGTYPE, len(values), {})
                assert {name: getattr(member, name) for name in FIXED} == FIXED
                start = place * (512 + 512)  # 65 values of 2 bytes: one block
                assert data[start : start + 512] == layout.header(chunk, len(values))
                assert data[start + 257 : start + 265] == b"ustar\x0000"
                assert data[start + 512 : start + 512 + len(values)] == values
                chunk += 1
    assert chunk == 16


def test_the_manifest_counts_and_hashes_what_the_files_hold(source: Path) -> None:
    value = json.loads((source / "manifest.json").read_bytes())
    assert (value["tokens"], value["chunks"], value["tokens_per_chunk"], value["dtype"]) == (1000, 16, 64, "uint16")
    assert [shard["chunks"] for shard in value["shards"]] == [4, 4, 4, 4]
    assert [shard["tokens"] for shard in value["shards"]] == [256, 256, 256, 232]
    for shard in value["shards"]:
        data, sidecar = (source / shard["name"]).read_bytes(), (source / shard["sidecar"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["sidecar_sha256"] == hashlib.sha256(sidecar).hexdigest()
        with tarfile.open(source / shard["name"]) as tar:
            parts = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
        assert sidecar == b"".join(hashlib.sha256(part).digest() for part in parts)
    assert value["tokenizer"]["sha256"] == hashlib.sha256((source / "tokenizer.model").read_bytes()).hexdigest()
    assert Manifest.load(source).fingerprint == hashlib.sha256((source / "manifest.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (1 << 20, "<u4")])
def test_ids_take_two_bytes_up_to_65536_of_them(vocab_size: int, dtype: str) -> None:
    found = layout.dtype_of(vocab_size)
    assert found == np.dtype(dtype) and np.array(vocab_size - 1).astype(found) == vocab_size - 1


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 600), st.integers(40, 400), st.integers(1, 5), st.sampled_from(["<u2", "<u4"]))
def test_the_arithmetic_of_sizes_is_that_of_the_files(
    tmp_path_factory: pytest.TempPathFactory, count: int, size: int, per_shard: int, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("sizes") / "s"
    tokens = many_tokens(count, 60_000).astype(dtype)
    entries = written(folder, tokens, size, per_shard)
    counts: Any = SimpleNamespace(tokens=count, tokens_per_chunk=size, dtype=np.dtype(dtype))
    first = 0
    for entry in entries:
        last = first + entry["chunks"]
        members = layout.member_sizes(first, last, counts)
        assert entry["bytes"] == layout.shard_bytes(members) == (folder / entry["name"]).stat().st_size
        first = last
    assert first == layout.num_chunks(count, size)
    starts = [layout.tokens_before(chunk, counts) for chunk in range(first + 1)]
    assert starts == [*range(0, first * size, size), count]


def written(folder: Path, tokens: np.ndarray[Any, Any], size: int | None, per_shard: int = 512) -> list[dict[str, Any]]:
    writer = ShardWriter(folder, tokens.dtype, size, per_shard)
    writer.add(tokens)
    return writer.finish()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=12))
def test_bytes_do_not_depend_on_the_pieces_in_which_tokens_came(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    tokens = many_tokens(sum(lengths), 60_000).astype("<u2")
    writer = ShardWriter(folder / "pieces", tokens.dtype, 64, 3)
    for part in np.split(tokens, np.cumsum(lengths)[:-1]):
        writer.add(part)
    assert writer.finish() == written(folder / "whole", tokens, 64, 3)


@pytest.mark.parametrize(
    ("count", "size"),
    [(1000, 1 << 14), (16 << 14, 1 << 14), ((16 << 15) + 1, 1 << 15), (16 << 19, 1 << 18), ((16 << 19) + 1, 1 << 19)],
)
def test_a_small_corpus_has_at_least_sixteen_chunks(tmp_path: Path, count: int, size: int) -> None:
    entries = written(tmp_path / "s", np.zeros(count, "<u2"), None)
    assert sum(entry["chunks"] for entry in entries) == -(-(count - 1) // size)
    with tarfile.open(tmp_path / "s" / entries[0]["name"]) as tar:
        assert tar.getmembers()[0].size == 2 * min(size + 1, count)
