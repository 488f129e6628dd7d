"""SentencePiece's tokenizers: lossless, deterministic, and no text makes a control id."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.tokenization import base as module
from pretrain.tokenization import pieces
from pretrain.tokenization.base import Tokenizer, cut
from pretrain.tokenization.foreign import load_tokenizer
from pretrain.tokenization.pieces import Pieces
from pretrain.tokenization.training import train_tokenizer
from tests.pretrain.tokenization.samples import TEXTS, any_text

CONTROLS = ["<s>", "</s>", "<pad>", "<mask>", "<cls>", "<sep>"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(TEXTS, 330, request.param)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TEXTS, 330)


# -- there and back --------------------------------------------------------------------------------------------------


def test_special_ids_are_fixed_and_controls(bpe: Tokenizer) -> None:
    assert bpe.special == {"unk": 0, "bos": 1, "eos": 2, "pad": 3, "mask": 4, "cls": 5, "sep": 6}
    assert bpe.eos == 2 and [bpe.piece(index) for index in (1, 2, 3, 4, 5, 6)] == CONTROLS
    assert bpe.decode([1, 2, 3, 4, 5, 6]) == ""
    assert bpe.vocab_size == 330


def test_the_model_is_one_that_stock_sentencepiece_reads(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(bpe.content)
    stock = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert stock.encode(TEXTS[3]) == bpe.encode(TEXTS[3]) == load_tokenizer(tmp_path / "m.model").encode(TEXTS[3])


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


# -- offsets and words ------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_offsets_slice_back_to_the_text_of_each_piece(tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert_tiles(offsets, len(text))
    for index, (start, end) in zip(ids, offsets, strict=True):
        piece = tokenizer.piece(index)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            assert end == start + 1 and int(piece[3:5], 16) in text[start:end].encode()
        else:
            assert text[start:end] == piece.replace("\u2581", " ")


def assert_tiles(offsets: list[tuple[int, int]], length: int) -> None:
    """Spans follow each other from 0 to length without gap; equal ones are bytes of one character."""
    place = 0
    for before, span in itertools.pairwise([(0, 0), *offsets]):
        assert span == before or span[0] == place
        place = span[1]
    assert place == length


@pytest.mark.parametrize(
    ("options", "text", "covered"),
    [
        ({"add_dummy_prefix": True}, "the fox", ["the", " fox"]),
        ({"remove_extra_whitespaces": True}, "  the   fox ", ["the", "   fox "]),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "\uff34\uff28\uff25 \ufb01x", ["\uff34\uff28\uff25", " \ufb01x"]),
    ],
)
def test_offsets_are_of_the_text_as_it_was_before_it_was_normalised(
    options: dict[str, Any], text: str, covered: list[str]
) -> None:
    model = io.BytesIO()
    plain = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "model_type": "bpe", "minloglevel": 2}
    texts = iter(["the fox fix", " fox the fix"] * 20)
    options = {"vocab_size": 40, "hard_vocab_limit": False, **plain, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options)
    found = Pieces(model.getvalue())
    ids, offsets = found.encode_with_offsets(text)
    assert ids == found.encode(text)
    spans = [offset for offset in offsets if offset[0] < offset[1]]
    words = [list(group) for _, group in itertools.groupby(spans, lambda span: span[0] >= text.index(" ", 2))]
    assert [text[group[0][0] : group[-1][1]].rstrip() for group in words] == [word.rstrip() for word in covered]
    assert all(first[1] == second[0] for first, second in itertools.pairwise(spans))


def test_offsets_of_a_text_longer_than_a_segment_are_of_the_whole(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the fox\n\u00e9\U0001f600 sings " * 40
    monkeypatch.setattr(module, "SEGMENT", 100)
    ids, offsets = bpe.encode_with_offsets(text)
    assert ids == bpe.encode(text)
    assert_tiles(offsets, len(text))


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab1_,. \n\t-\u00e9\u0301\u0414", min_size=1, max_size=40))
def test_a_word_is_a_run_of_letters_digits_and_marks(tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = tokenizer.encode_with_offsets(text)
    inside = [character == "\u0301" or (character.isalnum()) for character in text]
    expected = [True]
    for before, span in itertools.pairwise(offsets):
        expected.append(span != before and not (inside[span[0]] and inside[span[0] - 1]))
    assert tokenizer.word_starts(ids).tolist() == expected


def test_each_run_of_ideographs_and_no_control_goes_on_with_a_word() -> None:
    found = train_tokenizer(["a\u6f22\u5b57b " * 30], 270)
    ids = [*found.encode("a\u6f22b"), found.eos, *found.encode("a"), found.special["mask"]]
    assert found.word_starts(ids).all() and len(ids) == 6
    assert found.word_starts([]).tolist() == []


# -- special ids, and what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"text", b"\x80\x04pickle", b"\x0a" * 500])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.model is not a SentencePiece model"):
        load_tokenizer(path)


def test_a_missing_or_empty_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"Cannot read the tokenizer {tmp_path / 'none.model'}: "):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "empty.model").touch()
    with pytest.raises(UserError, match=r"empty\.model is not a tokenizer: it has 0 bytes"):
        load_tokenizer(tmp_path / "empty.model")


def test_a_model_without_a_document_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(path), vocab_size=120, eos_id=-1, minloglevel=2
    )
    with pytest.raises(UserError, match=r"has no control symbol that ends a document .*eos_id >= 0"):
        load_tokenizer(f"{path}.model")


def test_a_model_of_pieces_that_are_no_utf8_is_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    """SentencePiece itself takes it, and fails only where the piece is asked for."""
    place = bpe.content.index(b"<mask>")
    path = tmp_path / "bad.model"
    path.write_bytes(bpe.content[:place] + b"<m\xff\xfek>" + bpe.content[place + 6 :])
    with pytest.raises(UserError, match=f"{path} is not a SentencePiece model"):
        load_tokenizer(path)


def test_ids_as_arrays_are_those_of_lists_and_decode_to_the_same(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*TEXTS, "a\u2581b", "", "line\n" * 90]
    for segment in (module.SEGMENT, 100):
        monkeypatch.setattr(module, "SEGMENT", segment)
        monkeypatch.setattr(pieces, "SEGMENT", segment)
        rows = [tokenizer.encode_array(text) for text in texts]
        assert [row.tolist() for row in rows] == [tokenizer.encode(text) for text in texts]
        for some in (rows, [row for row in rows if len(row)], []):
            assert tokenizer.decode_many(some) == [tokenizer.decode(row.tolist()) for row in some]
