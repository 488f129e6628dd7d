"""Streams: tokens as cut by hand, hashes of batches, restarts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.chunks import Chunks
from pretrain.data.order import rank_numbers
from pretrain.data.stream import Stream, batch_hash
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import train_tokenizer
from tests.pretrain.data.corpus import documents_of, many_tokens, quietly, stdlib_texts, write_source, write_texts

FEW = settings(max_examples=30, deadline=None)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Path:
    """Real text in chunks of 2,048 tokens and its concatenated tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    write_texts(folder / "texts", stdlib_texts())
    quietly([folder / "texts"], folder / "out", tokenizer=model_file, validation=0, tokens_per_chunk=2048)
    return folder


@pytest.fixture(scope="module")
def by_hand(prepared: Path, tokenizer: Tokenizer) -> np.ndarray[Any, Any]:
    """The corpus as one run of tokens, a document end after each document."""
    ids = [[*tokenizer.encode(text), tokenizer.eos] for text in stdlib_texts()]
    return np.concatenate([np.array(part) for part in ids])


def cut(tokens: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """All sequences: one after the other, each with the token after it."""
    return np.stack([tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)])


@pytest.mark.parametrize("length", [16, 256, 2048])
def test_sequences_are_those_cut_by_hand_from_the_corpus(
    prepared: Path, by_hand: np.ndarray[Any, Any], length: int
) -> None:
    stream = Stream([prepared / "out/train"], length, seed=1, shuffle=False)
    expected = cut(by_hand, length)
    assert stream.samples_per_epoch == len(expected)
    assert np.array_equal(stream.read(np.arange(len(expected))), expected)
    assert np.array_equal(stream.read(np.arange(len(expected), len(expected) + 3)), expected[:3])  # the next epoch


def test_shuffled_reading_gives_the_sequence_that_the_order_names(
    prepared: Path, by_hand: np.ndarray[Any, Any]
) -> None:
    stream, expected = Stream([prepared / "out/train"], 64, seed=3, lanes=8, window=2), cut(by_hand, 64)
    numbers = np.arange(2 * len(expected), 3 * len(expected))
    tokens = stream.read(numbers)
    assert np.array_equal(tokens, expected[stream.order.locate(numbers)[1]])
    assert sorted(map(tuple, tokens)) == sorted(map(tuple, expected))


def test_every_token_but_the_first_is_a_target_once_an_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = many_tokens(64 * 15 + 33, tokenizer.vocab_size)
    stream = Stream([write_source(tmp_path / "s", tokens, tokenizer, 64, 4)], 32, seed=5)
    targets = stream.read(np.arange(stream.samples_per_epoch))[:, 1:]
    assert sorted(targets.ravel()) == sorted(tokens[1:])


def test_several_folders_are_read_each_from_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    runs = [many_tokens(500, 200), many_tokens(900, 150) + 100]
    folders = [
        write_source(tmp_path / str(number), run, tokenizer, size)
        for number, (run, size) in enumerate(zip(runs, (64, 128), strict=True))
    ]
    stream = Stream(folders, 16, seed=2, lanes=4, window=2, weights=[1, 3])
    numbers = np.arange(400)
    sources, samples = stream.order.locate(numbers)
    expected = [cut(run, 16)[sample] for run, sample in ((runs[s], n) for s, n in zip(sources, samples, strict=True))]
    assert np.array_equal(stream.read(numbers), expected)
    assert np.mean(sources) == pytest.approx(0.75, abs=0.02)
    one_after_the_other = Stream(folders, 16, seed=2, shuffle=False)
    assert np.array_equal(one_after_the_other.read(np.arange(87)), np.concatenate([cut(run, 16) for run in runs]))


def test_reading_again_from_sample_k_gives_the_same_rest(prepared: Path) -> None:
    whole = Stream([prepared / "out/train"], 32, seed=4)
    count = 2 * whole.samples_per_epoch + 50
    expected = whole.read(np.arange(count))
    for k in (0, 1, 77, whole.samples_per_epoch - 1, whole.samples_per_epoch, count - 1):
        again = Stream([prepared / "out/train"], 32, seed=4)
        assert np.array_equal(again.read(np.arange(k, count)), expected[k:])


def test_a_small_cache_and_few_open_files_change_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.arange(200)
    expected = Stream([source], 16, seed=1).read(numbers)
    monkeypatch.setattr("pretrain.data.chunks.OPEN_FILES", 1)
    stream = Stream([source], 16, seed=1)
    for chunks in stream._chunks:
        chunks._keep = 1
    assert np.array_equal(stream.read(numbers), expected)
    assert len(stream._chunks[0]._cache) == 1 and len(stream._chunks[0]._open) == 1


# -- the hash of a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_the_batch_hash_is_the_same_however_ranks_share_the_batch(prepared: Path, world: int) -> None:
    stream = Stream([prepared / "out/train"], 16, seed=1, lanes=8)
    whole = np.arange(48, 60)
    hashes = []
    for rank in range(world):
        numbers = rank_numbers(48, 12, rank, world, stream.lanes)
        hashes.append(batch_hash(numbers, stream.read(numbers)))
    total = int(np.sum(np.array(hashes, np.int64)))  # wraps as an int64 all-reduce does
    assert total == batch_hash(whole, stream.read(whole))


@FEW
@given(st.integers(0, 11), st.integers(0, 16), st.integers(1, 2**16 - 1))
def test_the_batch_hash_notices_one_other_token(row: int, column: int, change: int) -> None:
    numbers, tokens = np.arange(12), many_tokens(12 * 17, 400).reshape(12, 17)
    before = batch_hash(numbers, tokens)
    tokens[row, column] ^= change
    assert batch_hash(numbers, tokens) != before
    assert -(2**63) <= before < 2**63


def test_the_batch_hash_notices_samples_that_changed_places() -> None:
    numbers, tokens = np.arange(12), many_tokens(12 * 17, 400).reshape(12, 17)
    assert batch_hash(numbers, tokens) != batch_hash(numbers, tokens[::-1])
    assert batch_hash(numbers, tokens) == batch_hash(numbers[::-1], tokens[::-1])


# -- its recipe, and what it tells -----------------------------------------------------------------------------------


def test_whatever_decides_the_tokens_is_in_the_fingerprint(
    prepared: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = prepared / "out/train"
    other = write_source(tmp_path / "other", many_tokens(500, 200), tokenizer, 64)
    standard: dict[str, Any] = {"folders": [folder], "seq_length": 32, "seed": 1}
    variants: list[dict[str, Any]] = [
        {},
        {"folders": [other]},
        {"folders": [folder, other]},
        {"folders": [folder, other], "weights": [1, 2]},
        {"seq_length": 64},
        {"seed": 2},
        {"lanes": 8},
        {"window": 4},
        {"shuffle": False},
    ]
    prints = [Stream(**{**standard, **change}).fingerprint for change in variants]
    assert len(set(prints)) == len(prints)
    assert Stream(**standard).fingerprint == prints[0]


def test_explain_tells_where_a_sample_lies_and_its_text(prepared: Path, tokenizer: Tokenizer) -> None:
    stream = Stream([prepared / "out/train"], 1024, seed=6)
    found = stream.explain(stream.samples_per_epoch + 2)
    assert (found["epoch"], found["shard"]) == (1, "shard-00000.tar")
    start = found["chunk"] * 2048 + found["first_token"]
    text = "".join(found["documents"])
    ids = [index for text in stdlib_texts() for index in (*tokenizer.encode(text), tokenizer.eos)]
    assert text == tokenizer.decode(ids[start : start + 1024])


def test_documents_of_the_stream_are_those_of_the_corpus(prepared: Path, tokenizer: Tokenizer) -> None:
    stream = Stream([prepared / "out/train"], 1, seed=1, shuffle=False)
    tokens = stream.read(np.arange(stream.samples_per_epoch))
    assert documents_of(np.append(tokens[:, 0], tokens[-1, 1]), tokenizer) == stdlib_texts()


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (48, "The sequence length 48 does not divide the 64 tokens of a chunk .* nearest that do are 32 and 64;"),
        (3, "nearest that do are 2 and 4;"),
        (65, "nearest that do are 64;"),
        (1000, "A sequence of 1000 tokens is longer than the data: .*source has 1,000"),
        (0, "at least 1, not 0"),
    ],
)
def test_a_sequence_length_that_does_not_fit_names_the_nearest(source: Path, length: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Stream([source], length, seed=1)


def test_folders_of_different_tokenizers_are_refused(source: Path, tmp_path: Path) -> None:
    other = train_tokenizer(stdlib_texts(), 380, max_bytes=20_000)
    second = write_source(tmp_path / "second", many_tokens(500, 200), other, 64)
    with pytest.raises(UserError, match=r"second was prepared with another tokenizer than .*source: .* --tokenizer"):
        Stream([source, second], 16, seed=1)


def test_no_folder_and_impossible_weights_are_refused(source: Path) -> None:
    with pytest.raises(UserError, match="no folder of shards"):
        Stream([], 16, seed=1)
    with pytest.raises(UserError, match="one positive number for each source"):
        Stream([source, source], 16, seed=1, weights=[1.0])


def test_another_thread_that_begins_to_read_moves_no_row(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`row` is for others to look at; where a thread waits for the other's read it may be set in the middle of this one."""
    stream = Stream([source], 16, seed=1, lanes=8)
    expected = stream.read(np.arange(12))
    tokens = Chunks.tokens

    def disturbed(self: Chunks, chunk: int, first: int, count: int) -> np.ndarray:
        stream.row = 0
        return tokens(self, chunk, first, count)

    monkeypatch.setattr(Chunks, "tokens", disturbed)
    assert np.array_equal(stream.read(np.arange(12)), expected)
