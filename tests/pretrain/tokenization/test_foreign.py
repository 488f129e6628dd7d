"""Which tokenizer a path is, which symbols have which roles, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.tokenization import foreign, library
from pretrain.tokenization.foreign import load_tokenizer, open_tokenizer
from pretrain.tokenization.training import train_tokenizer
from tests.pretrain.tokenization.samples import TEXTS, WRITERS, write_wordpiece

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s", "world", "\u00e9"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("made")
    return {kind: write(home / kind) for kind, write in WRITERS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a small vocab.txt. May be changed by a test."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return tmp_path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- which kind --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "file", "file_kept"),
    [
        ("uncased", "vocab.txt", "tokenizer.json"),
        ("byte-level", "vocab.json", "tokenizer.json"),
        ("metaspace", "tokenizer.json", "tokenizer.json"),
    ],
)
def test_a_folder_and_its_file_are_one_tokenizer(made: dict[str, Path], kind: str, file: str, file_kept: str) -> None:
    whole, single = load_tokenizer(made[kind]), load_tokenizer(made[kind] / file)
    assert whole.content == single.content and whole.file == file_kept


def test_a_folder_with_a_sentencepiece_model_is_read_by_sentencepiece(tmp_path: Path) -> None:
    model = train_tokenizer(TEXTS, 330, out=tmp_path / "spiece.model")
    found = load_tokenizer(tmp_path)
    assert (found.content, found.file) == (model.content, "tokenizer.model")


def test_a_tokenizer_json_goes_before_what_it_was_made_from(tmp_path: Path, made: dict[str, Path]) -> None:
    shutil.copytree(made["metaspace"], tmp_path / "both")
    train_tokenizer(TEXTS, 330, out=tmp_path / "both" / "tokenizer.model")
    assert load_tokenizer(tmp_path / "both").content == load_tokenizer(made["metaspace"]).content


# -- roles -------------------------------------------------------------------------------------------------------------


def test_the_roles_of_each_kind(made: dict[str, Path]) -> None:
    roles = {kind: load_tokenizer(folder) for kind, folder in made.items()}
    names = {kind: {role: t.piece(index) for role, index in t.special.items()} for kind, t in roles.items()}
    bert = {"unk": "[UNK]", "eos": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]"}
    end = "<|endoftext|>"
    llama = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
    assert names == {"uncased": bert, "cased": bert, "byte-level": {"bos": end, "eos": end}, "metaspace": llama}


def test_a_configuration_tells_roles_otherwise(tmp_path: Path, made: dict[str, Path]) -> None:
    shutil.copytree(made["metaspace"], tmp_path / "t")
    told = {"eos_token": "<s>", "bos_token": None, "pad_token": {"content": "</s>"}, "mask_token": "nowhere"}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(told))
    found = load_tokenizer(tmp_path / "t")
    assert {role: found.piece(index) for role, index in found.special.items()} == {
        "unk": "<unk>",
        "eos": "<s>",
        "pad": "</s>",
    }


def test_a_role_makes_a_control_of_what_the_file_calls_text(tmp_path: Path, made: dict[str, Path]) -> None:
    shutil.copytree(made["metaspace"], tmp_path / "t")
    description = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token["special"] = False
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(description))
    found = load_tokenizer(tmp_path / "t")
    assert found.eos not in found.encode("a </s> b") and found.decode([found.eos]) == ""


@pytest.mark.parametrize(("told", "lower"), [({"do_lower_case": False}, False), ({"do_lower_case": True}, True)])
def test_the_configuration_decides_on_lower_case(folder: Path, told: dict[str, bool], lower: bool) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    assert (load_tokenizer(folder).encode("HELLO") == [5]) is lower


def test_without_configuration_a_vocabulary_with_capitals_keeps_them(tmp_path: Path) -> None:
    cased = load_tokenizer(write_wordpiece(tmp_path / "cased", lower=False, config=False))
    uncased = load_tokenizer(write_wordpiece(tmp_path / "uncased", lower=True, config=False))
    assert uncased.encode("Import") == uncased.encode("import")
    assert cased.encode("Import") != cased.encode("import")


def test_a_vocabulary_may_have_windows_line_ends_and_odd_separators(folder: Path) -> None:
    (folder / "vocab.txt").write_bytes("\r\n".join([*VOCAB, "\u2028"]).encode())
    found = load_tokenizer(folder)
    assert found.vocab_size == 10 and found.encode("hellos world") == [5, 6, 7]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_vocabulary_that_is_not_utf8_is_told_by_line(folder: Path) -> None:
    path = folder / "vocab.txt"
    path.write_bytes(path.read_bytes() + b"ab\xff\n")
    assert refusal(folder) == f"{path}, line 10: not UTF-8 (byte {len(path.read_bytes()) - 2})."


def test_merges_that_are_none_are_told_by_line(tmp_path: Path, made: dict[str, Path]) -> None:
    shutil.copytree(made["byte-level"], tmp_path / "t")
    (tmp_path / "t" / "merges.txt").write_text("#version: 0.2\na b\na b c\n")
    assert "merges.txt, line 3: 3 pieces where two that merge are expected" in refusal(tmp_path / "t")
    (tmp_path / "t" / "merges.txt").unlink()
    assert "Cannot read the tokenizer" in refusal(tmp_path / "t")


def without_eos(value: dict[str, Any]) -> None:
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] != "</s>"]
    value["model"]["vocab"]["end"] = value["model"]["vocab"].pop("</s>")


def another_id(value: dict[str, Any]) -> None:
    value["model"]["vocab"]["the"] = 2**31


def no_model(value: dict[str, Any]) -> None:
    del value["model"]


def no_tokens(value: dict[str, Any]) -> None:
    value["added_tokens"] = [{"id": 0}]


def half_a_character(value: dict[str, Any]) -> None:
    value["model"]["vocab"]["\ud800"] = 5


def a_merge_of_nothing(value: dict[str, Any]) -> None:
    value["model"]["merges"].append(["nothing", "known"])


def a_pickle(value: dict[str, Any]) -> None:
    value["pre_tokenizer"] = {"type": "PyPreTokenizer", "pickle": "cos\nsystem"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_eos, "has no control symbol that ends a document: name one as eos_token in tokenizer_config.json"),
        (another_id, "its largest id is 2,147,483,648; ids below 16,777,216 can be used"),
        (no_model, "is not a tokenizer of Hugging Face's `tokenizers`: KeyError('model')"),
        (no_tokens, "is not a tokenizer of Hugging Face's `tokenizers`: KeyError('content')"),
        (half_a_character, "is not a tokenizer: "),
        (a_merge_of_nothing, "is not a tokenizer that Hugging Face's `tokenizers`"),
        (a_pickle, "is not a tokenizer that Hugging Face's `tokenizers`"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_is_one_message(
    tmp_path: Path, made: dict[str, Path], change: Callable[[dict[str, Any]], None], words: str
) -> None:
    value = json.loads((made["metaspace"] / "tokenizer.json").read_text())
    change(value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    message = refusal(tmp_path)
    assert str(tmp_path / "tokenizer.json") in message and words in message


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[]", b"\xff\xfe", b"{" * 10**5, b'{"a":' * 10**5 + b"1" + b"}" * 10**5]
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    assert str(tmp_path / "tokenizer.json") in refusal(tmp_path / "tokenizer.json")


def test_files_beyond_the_limits_are_not_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "MAX_JSON_BYTES", 10)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert "tokenizer_config.json has 23 bytes, more than the 10 that are read" in refusal(folder)
    monkeypatch.setattr(foreign, "MAX_BYTES", 10)
    assert "vocab.txt is not a tokenizer: it has 11 bytes" in refusal(folder / "vocab.txt")


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no tokenizer: none of tokenizer.json, vocab.txt, vocab.json, *.model" in refusal(tmp_path)


@pytest.mark.parametrize("special", [None, [], {}, {"eos": 10**6}, {"eos": True}, {"eos": 2, "end": 2}, {"bos": 1}])
def test_ids_of_roles_that_cannot_be_are_refused(made: dict[str, Path], special: Any) -> None:
    value = json.loads(load_tokenizer(made["metaspace"]).content)
    with pytest.raises(UserError, match="`special` must give ids of its vocabulary by role, eos among them"):
        open_tokenizer("tokenizer.json", json.dumps({**value, "special": special}).encode())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_changed_give_a_user_error_or_a_tokenizer(folder: Path, data: st.DataObject) -> None:
    raw = bytearray(load_tokenizer(folder / "vocab.txt").content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        end = start + data.draw(st.sampled_from([0, 1, 1, 2, 8, 60]))
        raw[start:end] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"9" * 12, b"{", b"}", b'"', b"\\ud800", b"null"])
        )
    (folder / "tokenizer.json").write_bytes(raw)
    try:
        found = load_tokenizer(folder / "tokenizer.json")
        ids, offsets = found.encode_with_offsets("hello worlds \u00e9 [MASK]")
        found.decode(ids)
        assert len(ids) == len(offsets) == len(found.word_starts(ids))
    except UserError as error:
        assert "tokenizer.json" in str(error)
