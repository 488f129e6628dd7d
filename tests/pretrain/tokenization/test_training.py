"""Training of a SentencePiece tokenizer: deterministic, on a bounded sample, and what it refuses."""

from __future__ import annotations

import hashlib
from itertools import accumulate
from pathlib import Path
from random import Random

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import VocabularyTooLarge, sample, train_tokenizer
from tests.pretrain.tokenization.samples import TEXTS, any_text


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TEXTS, 330)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_gives_the_same_bytes_whatever_the_order_of_texts(model_type: str, tmp_path: Path) -> None:
    first = train_tokenizer(TEXTS, 330, model_type, max_bytes=20_000)
    again = train_tokenizer(iter(TEXTS[::-1]), 330, model_type, out=tmp_path / "m", max_bytes=20_000)
    assert first.content == again.content == (tmp_path / "m").read_bytes()
    assert first.sha256 == hashlib.sha256(first.content).hexdigest()
    if model_type == "bpe":
        assert train_tokenizer(TEXTS, 330, seed=1, max_bytes=5_000).content != first.content


@settings(max_examples=60, deadline=None)
@example(["01", "0", "1"], 2, 0, Random(0))  # the long one is shed: its room is not for what comes after it
@given(
    st.lists(any_text | st.text("01", max_size=3), max_size=30), st.integers(1, 400), st.integers(0, 3), st.randoms()
)
def test_the_sample_is_bounded_and_does_not_know_the_order(
    texts: list[str], limit: int, seed: int, random: Random
) -> None:
    found = sample(texts, limit, seed)
    shuffled = list(texts)
    random.shuffle(shuffled)
    assert sample(shuffled, limit, seed) == found
    by_hash = sorted(filter(None, texts), key=lambda text: xxhash.xxh64_intdigest(text.encode(), seed=seed))
    sizes = list(accumulate(len(text.encode()) for text in by_hash))
    assert found == by_hash[: max(1, sum(size <= limit for size in sizes))]


def test_digits_are_pieces_one_by_one() -> None:
    numbers = train_tokenizer([*TEXTS, *(f"in {year} of 1234567890\n" * 9 for year in range(1900, 2000))], 330)
    assert [numbers.piece(index) for index in numbers.encode("1234567890")] == list("1234567890")


def test_runs_of_spaces_and_line_ends_are_pieces(bpe: Tokenizer) -> None:
    pieces = [bpe.piece(index) for index in bpe.encode("\n\n\t        return")]
    assert pieces[:3] == ["\n", "\n", "\t"]
    assert "".join(pieces[3:]) == "\u2581" * 8 + "return" and len(pieces) <= 6


@pytest.mark.parametrize("symbol", ["", "<unk>", "<s>", "</s>", "<pad>", "<mask>", "<cls>", "<sep>", "<0x41>", "a\0b"])
def test_symbols_that_would_replace_others_are_refused(symbol: str) -> None:
    with pytest.raises(UserError, match="cannot be a user symbol: it is empty or reserved"):
        train_tokenizer(TEXTS, 330, user_symbols=[symbol])


def test_a_vocabulary_that_cannot_be_names_one_that_can() -> None:
    with pytest.raises(VocabularyTooLarge, match="the largest that works is") as error:
        train_tokenizer(TEXTS, 30_000)
    assert train_tokenizer(TEXTS, error.value.largest).vocab_size == error.value.largest
    with pytest.raises(UserError, match=r"at least \d+ is needed") as small:
        train_tokenizer(TEXTS, 100)
    least = int(str(small.value).split("at least ")[1].split()[0])
    assert train_tokenizer(TEXTS, least).vocab_size == least


@pytest.mark.parametrize(
    ("texts", "size", "kind", "words"),
    [
        ([], 330, "bpe", "no text to train"),
        ([""], 330, "bpe", "no text to train"),
        (TEXTS, 0, "bpe", "must be at least 1"),
        (TEXTS, 330, "word", "bpe or unigram, not 'word'"),
    ],
)
def test_training_that_cannot_be_is_refused(texts: list[str], size: int, kind: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_tokenizer(texts, size, kind)
