"""The tokenizer: lossless, deterministic, and no text makes a control id."""

from __future__ import annotations

import hashlib
from itertools import accumulate
from pathlib import Path
from random import Random

import pytest
import sentencepiece
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain import tokenizer as module
from pretrain.errors import UserError
from pretrain.tokenizer import Tokenizer, VocabularyTooLarge, cut, sample, train_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "1234567890", "birds", "sing", "def"]
WORDS += ["return", "self", "import", "class"]
TEXTS = [
    f"{WORDS[n % 17]}_{WORDS[n * 7 % 17]}({n}):\n\tif {WORDS[n * 3 % 17]} == '{n * n}':\n        return\r\n" * 2
    + " ".join(WORDS[(n * k) % 17] for k in range(20))
    for n in range(120)
]
CONTROLS = ["<s>", "</s>", "<pad>", "<mask>", "<cls>", "<sep>"]
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=200)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(TEXTS, 330, request.param)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TEXTS, 330)


# -- there and back --------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(text=any_text | st.text("ab \t\r\n</s>", max_size=60))
def test_any_text_decodes_to_itself(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


@pytest.mark.parametrize(
    "text", ["", " ", "  \n\n ", "\r\n", "\0", "a\0b", "\ufeff", "\ufffd", "\U0010ffff", "e\u0301", "\u3000", "\x7f"]
)
def test_odd_texts_decode_to_themselves(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from([*CONTROLS, "<unk>", "<0x0A>", " ", "a", "\n"]), max_size=12).map("".join))
def test_no_text_makes_a_control_id(tokenizer: Tokenizer, text: str) -> None:
    special = set(tokenizer.special.values())
    assert len(special) == 7
    ids = tokenizer.encode(text)
    assert special.isdisjoint(ids) and tokenizer.decode(ids) == text


def test_a_text_longer_than_a_segment_is_cut_without_loss(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT", 100)
    for text in ("".join(TEXTS), "no line end " * 50, "\u00e9\U0001f600" * 333, "\n" * 555):
        assert bpe.decode(bpe.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text("ab\n", max_size=80), st.integers(1, 20))
def test_cut_gives_bounded_parts_that_end_lines_where_they_can(text: str, limit: int) -> None:
    parts = list(cut(text, limit))
    assert "".join(parts) == text
    assert all(len(part) <= limit for part in parts)
    assert all(part.endswith("\n") or ("\n" not in part and len(part) == limit) for part in parts[:-1])


@pytest.mark.parametrize("ids", [[-1], [330], [5, 10**6], [2**31], [2**70], [-(2**40)]])
def test_ids_outside_the_vocabulary_are_a_value_error(bpe: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids must be 0 to 329"):
        bpe.decode(ids)


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_gives_the_same_bytes_whatever_the_order_of_texts(model_type: str, tmp_path: Path) -> None:
    first = train_tokenizer(TEXTS, 330, model_type, max_bytes=20_000)
    again = train_tokenizer(iter(TEXTS[::-1]), 330, model_type, out=tmp_path / "m", max_bytes=20_000)
    assert first.model == again.model == (tmp_path / "m").read_bytes()
    assert first.sha256 == hashlib.sha256(first.model).hexdigest()
    if model_type == "bpe":
        assert train_tokenizer(TEXTS, 330, seed=1, max_bytes=5_000).model != first.model


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


def test_special_ids_are_fixed_and_controls(bpe: Tokenizer) -> None:
    assert bpe.special == {"unk": 0, "bos": 1, "eos": 2, "pad": 3, "mask": 4, "cls": 5, "sep": 6}
    assert bpe.eos == 2 and [bpe.piece(index) for index in (1, 2, 3, 4, 5, 6)] == CONTROLS
    assert bpe.decode([1, 2, 3, 4, 5, 6]) == ""
    assert bpe.vocab_size == 330


def test_the_model_is_one_that_stock_sentencepiece_reads(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(bpe.model)
    stock = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert stock.encode(TEXTS[3]) == bpe.encode(TEXTS[3]) == Tokenizer.load(tmp_path / "m.model").encode(TEXTS[3])


def test_digits_are_pieces_one_by_one() -> None:
    numbers = train_tokenizer([*TEXTS, *(f"in {year} of 1234567890\n" * 9 for year in range(1900, 2000))], 330)
    assert [numbers.piece(index) for index in numbers.encode("1234567890")] == list("1234567890")


def test_runs_of_spaces_and_line_ends_are_pieces(bpe: Tokenizer) -> None:
    pieces = [bpe.piece(index) for index in bpe.encode("\n\n\t        return")]
    assert pieces[:3] == ["\n", "\n", "\t"]
    assert "".join(pieces[3:]) == "\u2581" * 8 + "return" and len(pieces) <= 6


# -- what is refused -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("data", [b"", b"text", b"\x80\x04pickle", b"\x0a" * 500])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.model is not a SentencePiece model"):
        Tokenizer.load(path)


def test_a_missing_file_or_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.model", tmp_path):
        with pytest.raises(UserError, match=f"Cannot read the tokenizer {path}: "):
            Tokenizer.load(path)


def test_a_model_without_a_document_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path), vocab_size=120, eos_id=-1, minloglevel=2
    )
    with pytest.raises(UserError, match=r"has no control symbol that ends a document .*eos_id >= 0"):
        Tokenizer.load(f"{path}.model")
