"""Tokenizers of Hugging Face's library: the same ids as transformers gives, offsets of characters, and no control ids."""

from __future__ import annotations

import itertools
import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.tokenization import base as module
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import load_tokenizer, open_tokenizer
from pretrain.tokenization.library import BYTES
from tests.pretrain.tokenization.samples import TEXTS, WRITERS, corpus

# Symbols that transformers would take for controls are left to the tests of controls.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=80)
odd_text = st.text(
    "aZ \u00e9\u0301e\u0130\u6f22\u5b57\U0001f600\U0001f469\u200d\u00a0\t\n#'.,\x00\u00ad\u1e9b", max_size=30
)


@pytest.fixture(scope="module", params=list(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[kind](tmp_path_factory.mktemp("foreign") / kind)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def theirs_of(kind: str, folder: Path, fast: bool = True) -> Any:
    """transformers' own reading of the same files."""
    if kind in ("uncased", "cased"):
        reader = transformers.BertTokenizerFast if fast else transformers.BertTokenizer
        return reader(str(folder / "vocab.txt"), do_lower_case=kind == "uncased")
    if kind == "byte-level":
        reader = transformers.GPT2TokenizerFast if fast else transformers.GPT2Tokenizer
        return reader(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def theirs(kind: str, folder: Path) -> Any:
    return theirs_of(kind, folder)


# -- ids and text ------------------------------------------------------------------------------------------------------


def test_thousands_of_lines_have_the_ids_that_transformers_gives(kind: str, folder: Path, ours: Tokenizer) -> None:
    """By its tokenizers in Python too, which share nothing with the library; BERT's composes characters first (NFC)."""
    lines = [line for line in corpus() if "<" not in line and "[" not in line]
    lines = [line for line in lines if unicodedata.is_normalized("NFC", line)]
    assert len(lines) > 2000
    for theirs in (theirs_of(kind, folder, fast) for fast in ([True, False] if kind != "metaspace" else [True])):
        wrong = [line for line in lines if ours.encode(line) != theirs.encode(line, add_special_tokens=False)]
        assert wrong == []


@settings(max_examples=300, deadline=None)
@given(text=any_text | odd_text)
def test_any_text_has_the_ids_offsets_and_text_that_transformers_gives(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids, offsets = ours.encode_with_offsets(text)
    expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    assert (ids, offsets) == (expected["input_ids"], expected["offset_mapping"])
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert [ours.piece(index) for index in ids] == theirs.convert_ids_to_tokens(ids)


@settings(max_examples=300, deadline=None)
@given(text=any_text | odd_text)
def test_offsets_slice_back_to_the_text_of_each_piece(kind: str, ours: Tokenizer, text: str) -> None:
    ids, offsets = ours.encode_with_offsets(text)
    assert all(first[0] <= second[0] for first, second in itertools.pairwise(offsets))
    for index, (start, end) in zip(ids, offsets, strict=True):
        assert 0 <= start <= end <= len(text)
        piece, part = ours.piece(index), text[start:end]
        if kind == "byte-level":
            data = bytes(BYTES[character] for character in piece)
            assert part.encode() == data or (data in part.encode() and "\ufffd" in data.decode(errors="replace"))
        elif re.fullmatch("<0x..>", piece):
            assert int(piece[3:5], 16) in part.encode()
        elif index != ours.special["unk"] and kind == "cased":
            assert plain(part) == piece.removeprefix("##")
        elif index != ours.special["unk"] and kind == "uncased":
            assert without_accents(part) == piece.removeprefix("##")
        elif index != ours.special["unk"]:
            assert part.strip() == piece.strip("\u2581 ") or not piece.strip("\u2581")


def plain(part: str) -> str:
    """Without what BERT's cleaning drops."""
    return "".join(c for c in part if not unicodedata.category(c).startswith("C") and c != "\ufffd")


def without_accents(part: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", plain(part).lower()) if unicodedata.category(c) != "Mn")


def test_byte_level_decodes_to_the_text_and_covers_every_character(tmp_path: Path) -> None:
    ours = load_tokenizer(WRITERS["byte-level"](tmp_path / "gpt2"))
    for text in corpus():
        ids, offsets = ours.encode_with_offsets(text)
        assert ours.decode(ids) == text
        assert {place for start, end in offsets for place in range(start, end)} == set(range(len(text)))


@pytest.mark.parametrize("ids", [[-1], [5, 10**6], [2**31], [2**70]])
def test_ids_outside_the_vocabulary_are_a_value_error(ours: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=f"token ids must be 0 to {ours.vocab_size - 1}"):
        ours.decode(ids)


def test_its_file_opens_again_to_the_same_tokenizer(ours: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / ours.file).write_bytes(ours.content)
    for again in (open_tokenizer(ours.file, ours.content), load_tokenizer(tmp_path)):
        assert (again.special, again.vocab_size, again.sha256) == (ours.special, ours.vocab_size, ours.sha256)
        assert all(again.encode(text) == ours.encode(text) for text in TEXTS[:20])


def test_a_text_longer_than_a_segment_is_cut_after_line_ends(kind: str, ours: Tokenizer, monkeypatch: Any) -> None:
    text = "the fox\n" * 50
    whole = ours.encode_with_offsets(text)
    monkeypatch.setattr(module, "SEGMENT", 101)
    ids, offsets = ours.encode_with_offsets(text)
    assert ours.encode(text) == ids
    if kind != "metaspace":  # which puts a space before each part
        assert (ids, offsets) == whole
    assert offsets[-1][1] == whole[1][-1][1]


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uncased", "cased"], indirect=True)
def test_words_begin_where_wordpiece_begins_them(ours: Tokenizer) -> None:
    ids = [index for text in corpus() for index in ours.encode(text)]
    expected = [True] + [not ours.piece(index).startswith("##") for index in ids[1:]]
    assert ours.word_starts(ids).tolist() == expected and not all(expected)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"], indirect=True)
@settings(max_examples=200, deadline=None)
@given(text=st.text("ab1_,. \n\t-\u00e9\u0301\u0414", min_size=1, max_size=40))
def test_a_word_is_a_run_of_letters_digits_and_marks(ours: Tokenizer, text: str) -> None:
    ids, offsets = ours.encode_with_offsets(text)
    inside = [character.isalnum() or character == "\u0301" for character in text]
    expected = [True]
    for (before, (start, end)), last in zip(itertools.pairwise(offsets), ids, strict=False):
        joined = 0 < start < end and inside[start] and inside[start - 1]
        expected.append(ours.piece(last) == "\u2581" or ((start, end) != before and not joined))
    assert ours.word_starts(ids).tolist() == expected


# -- controls ----------------------------------------------------------------------------------------------------------


SYMBOLS = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "<|endoftext|>", "<s>", "</s>", "<unk>", "<0x41>"]


@settings(max_examples=200, deadline=None)
@example(text="[MASK]")
@given(text=st.lists(st.sampled_from([*SYMBOLS, " ", "a", "\n"]), min_size=1, max_size=12).map("".join))
def test_no_text_makes_a_control_id(kind: str, ours: Tokenizer, text: str) -> None:
    ids, offsets = ours.encode_with_offsets(text)
    controls = {index for role, index in ours.special.items() if role != "unk"}
    assert controls and controls.isdisjoint(ids) and ids == ours.encode(text)
    if kind in ("byte-level", "metaspace"):
        assert ours.decode(ids) == text
    assert {place for span in offsets for place in range(*span)} >= {n for n, c in enumerate(text) if not c.isspace()}


def word_level(unk: bool) -> bytes:
    """A tokenizer of words between spaces, whose vocabulary holds its controls as words."""
    words = ["[MASK]", "[SEP]", "hello", *"[MASK]", *(["[UNK]"] if unk else [])]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    description = {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": words[index], **token} for index in (0, 1)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        "special": {"mask": 0, "sep": 1, "eos": 1, **({"unk": vocabulary["[UNK]"]} if unk else {})},
    }
    return json.dumps(description).encode()


def test_a_control_among_the_models_own_words_is_unknown_or_spelled() -> None:
    unknowing = open_tokenizer("tokenizer.json", word_level(unk=True))
    unk = unknowing.special["unk"]
    assert unknowing.encode_with_offsets("hello [MASK]") == ([2, unk], [(0, 5), (6, 12)])
    spelling = open_tokenizer("tokenizer.json", word_level(unk=False))
    ids, offsets = spelling.encode_with_offsets("[MASK] hello")
    assert [spelling.piece(index) for index in ids] == [*"[MASK]", "hello"]
    assert offsets == [*((place, place + 1) for place in range(6)), (7, 12)]


def test_a_text_that_the_tokenizer_cannot_encode_is_one_message() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json cannot encode this text: .*"):
        open_tokenizer("tokenizer.json", word_level(unk=False)).encode("another")


def test_without_the_library_the_message_names_the_extra(ours: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'pretrain-engine\[finetune\]'"):
        open_tokenizer(ours.file, ours.content)
