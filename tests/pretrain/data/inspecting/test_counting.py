"""Counts of a source equal those of a plain walk over its documents, and stay bounded where it is large."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.inspecting import counting
from pretrain.data.inspecting.counting import bins, chosen_runs, count, quantile
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.data.corpus import write_source

Array = np.ndarray[Any, Any]


def documents(tokenizer: Tokenizer, number: int) -> list[list[int]]:
    """Of many lengths, some alike; one longer than several chunks, one that just fills the rest of a chunk."""
    ids = [index for index in range(tokenizer.vocab_size) if index != tokenizer.eos]
    lengths = [(7 * place) % 23 + 1 for place in range(number)]
    lengths[3] = 300
    made = [[ids[(place * 31 + i) % len(ids)] for i in range(length)] for place, length in enumerate(lengths)]
    return [*made, made[0], made[3], made[0]]


def source_of(folder: Path, tokenizer: Tokenizer, texts: list[list[int]], per_chunk: int = 64) -> Manifest:
    tokens = np.array([index for text in texts for index in [*text, tokenizer.eos]])
    return Manifest.load(write_source(folder, tokens, tokenizer, per_chunk, 4))


@pytest.mark.parametrize("per_chunk", [1, 7, 64, 5000])
def test_counts_equal_a_walk_over_the_documents(tmp_path: Path, tokenizer: Tokenizer, per_chunk: int) -> None:
    texts = documents(tokenizer, 120)
    manifest = source_of(tmp_path / "source", tokenizer, texts, per_chunk)
    found = count(manifest)
    assert found.is_whole and found.tokens == manifest.tokens and found.chunks == manifest.chunks
    assert found.documents == found.hashed == len(texts) and found.cut == 0
    assert found.lengths == Counter(len(text) + 1 for text in texts)
    copies = Counter(map(tuple, texts))
    assert found.duplicates == len(texts) - len(copies) >= 3
    assert found.most_copies == max(copies.values())
    walked = Counter(index for text in texts for index in [*text, tokenizer.eos])
    assert found.ids.tolist() == [walked[index] for index in range(tokenizer.vocab_size)]
    assert found.filler == 0


def test_ends_behind_ends_are_filler_and_no_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos
    text = [3 if eos != 3 else 4] * 5
    rows = [*text, eos, eos, eos, *text, eos, eos, *text, text[0], eos]
    manifest = Manifest.load(write_source(tmp_path / "source", np.array(rows), tokenizer, 4, 4))
    found = count(manifest)
    assert (found.filler, found.documents, found.duplicates) == (3, 3, 1)
    assert found.lengths == {6: 2, 7: 1}


def test_a_large_source_is_sampled_the_same_way_each_time(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the chosen chunks are read; documents that their borders cut are left out, not shortened."""
    texts = documents(tokenizer, 900)
    manifest = source_of(tmp_path / "source", tokenizer, texts, 16)
    monkeypatch.setattr(counting, "EXACT_TOKENS", 1000)
    monkeypatch.setattr(counting, "RUNS", 5)
    monkeypatch.setattr(counting, "RUN_TOKENS", 8 * 16)
    runs = chosen_runs(manifest)
    assert runs == chosen_runs(manifest) and len(runs) == 5
    assert all(last - first == 8 and last <= manifest.chunks for first, last in runs)
    read: list[int] = []
    found = count(manifest, read.append)
    assert not found.is_whole and sum(read) == found.tokens == 5 * 8 * 16 and found.chunks == 40

    ids = np.concatenate([np.array([*text, tokenizer.eos]) for text in texts])
    expected, cut = Counter[int](), 0
    for first, last in runs:
        part = ids[first * 16 : last * 16]
        ends = np.flatnonzero(part == tokenizer.eos)
        begins = ends if first else np.concatenate([[-1], ends])
        expected.update(np.diff(begins).tolist())
        cut += bool(len(ends)) and part[-1] != tokenizer.eos
    assert found.lengths == expected and found.documents == expected.total() and found.cut == cut > 0
    assert set(found.lengths) <= {len(text) + 1 for text in texts}


def test_memory_is_bounded_by_hashing_no_more_documents(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "MOST_HASHES", 10)
    texts = documents(tokenizer, 120)
    found = count(source_of(tmp_path / "source", tokenizer, texts))
    assert found.hashed == 10 and found.documents == len(texts)
    assert found.duplicates == 10 - len(set(map(tuple, texts[:10])))


def test_a_damaged_chunk_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = source_of(tmp_path / "source", tokenizer, documents(tokenizer, 120))
    shard = manifest.folder / manifest.shards[1].name
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00001.tar, chunk 4: its bytes were altered"):
        count(manifest)


def test_bins_double_and_quantiles_are_lengths() -> None:
    lengths = Counter({1: 1, 2: 2, 3: 3, 9: 4, 16: 5})
    assert list(bins(lengths)) == [(1, 1, 1), (2, 3, 5), (4, 7, 0), (8, 15, 4), (16, 31, 5)]
    assert [quantile(lengths, share) for share in (0.0, 0.4, 0.41, 0.5, 1.0)] == [1, 3, 9, 9, 16]
    assert list(bins(Counter())) == [] and quantile(Counter(), 0.5) == 0
