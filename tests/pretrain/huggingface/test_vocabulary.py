"""Tokenizers written for transformers: AutoTokenizer loads them as they are, with our ids, and they come back bytewise."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.huggingface.export import export
from pretrain.huggingface.importing import import_folder
from pretrain.huggingface.vocabulary import Use, notes, read_tokenizer, write_tokenizer
from pretrain.runs import run_config, run_tokenizer
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import load_tokenizer
from pretrain.tokenization.pieces import Pieces
from pretrain.tokenization.training import train_tokenizer
from pretrain.vocabulary import vocabulary_of
from tests.pretrain.data.corpus import ODD, stdlib_texts
from tests.pretrain.huggingface.models import BERT, write_run
from tests.pretrain.tokenization.samples import TEXTS, WRITERS, corpus

any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\u2581"), max_size=80)
code_text = st.lists(st.sampled_from(["def", " ", "  ", "    ", "\n", "\t", "self", "(x)", "\u00e9"]), max_size=30).map(
    "".join
)


LONG = Use(10**6)


def exchanged(tokenizer: Tokenizer, folder: Path, use: Use = LONG) -> Any:
    """As AutoTokenizer has it."""
    folder.mkdir()
    write_tokenizer(folder, tokenizer, use)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return train_tokenizer([*stdlib_texts(30), *ODD], 900, user_symbols=["<tool>", "two\u2581words", "never found"])


@pytest.fixture(scope="module")
def theirs(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exchanged(ours, tmp_path_factory.mktemp("vocabulary") / "bpe")


def test_thousands_of_texts_have_our_ids_and_come_back(ours: Tokenizer, theirs: Any) -> None:
    texts = [*corpus(), *stdlib_texts(30), "a <tool>two  words two words\n\n<tool> never found"]
    texts = [text for text in texts if not any(symbol in text for symbol in ("<s>", "</s>", "<unk>"))]
    assert len(texts) > 2000
    assert [text for text in texts if theirs(text).input_ids != ours.encode(text)] == []
    assert [text for text in texts if theirs.decode(ours.encode(text)) != text] == []


@settings(max_examples=300, deadline=None)
@given(text=any_text | code_text)
def test_any_text_has_our_ids_and_offsets(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids, offsets = ours.encode_with_offsets(text)
    expected = theirs(text, return_offsets_mapping=True)
    assert (ids, offsets) == (expected["input_ids"], expected["offset_mapping"])


def test_roles_are_told(ours: Tokenizer, theirs: Any) -> None:
    roles = {role: getattr(theirs, f"{role}_token_id") for role in ours.special}
    assert roles == ours.special and theirs.vocab_size + 0 <= len(theirs) == ours.vocab_size
    assert set(theirs("text")) == {"input_ids", "attention_mask"}


def test_a_unigram_model_differs_in_ties_alone_and_says_so(tmp_path: Path) -> None:
    ours = train_tokenizer(stdlib_texts(30), 900, "unigram")
    theirs = exchanged(ours, tmp_path / "unigram")
    processor = ours._processor  # type: ignore[attr-defined]
    differing = 0
    for text in corpus():
        if "<" in text:
            continue
        found, expected = theirs(text).input_ids, ours.encode(text)
        differing += found != expected
        scores = [sum(processor.GetScore(index) for index in ids) for ids in (found, expected)]
        assert found == expected or scores[0] == pytest.approx(scores[1], rel=1e-6)
        assert theirs.decode(found) == text
    assert differing < 0.01 * len(corpus())
    assert notes(ours) == ["tokenizer.json may choose another of several segmentations with the same unigram score"]


def trained(**options: Any) -> Pieces:
    model = io.BytesIO()
    plain = {"vocab_size": 300, "hard_vocab_limit": False, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **{**plain, **options})
    return Pieces(model.getvalue())


@pytest.mark.parametrize(
    "options",
    [
        {
            "byte_fallback": True,
            "vocab_size": 400,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
        },
        {"byte_fallback": True, "vocab_size": 400},
        {},
        {"normalization_rule_name": "nmt_nfkc_cf"},
    ],
    ids=["Llama 2's", "byte fallback", "defaults", "lower case"],
)
@settings(max_examples=150, deadline=None)
@given(text=st.text("ab Z\u00e9\uff21\ufb01\u6f22\t.,the", max_size=30))
def test_models_with_sentencepieces_own_defaults_have_our_ids(
    options: dict[str, Any], text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    key = str(sorted(options.items()))
    if key not in MADE:
        ours = trained(**options)
        MADE[key] = (ours, exchanged(ours, tmp_path_factory.mktemp("defaults") / "t"))
    ours, theirs = MADE[key]
    assert theirs(text).input_ids == ours.encode(text)


MADE: dict[str, tuple[Pieces, Any]] = {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"user_defined_symbols": ["@"]}, "has user-defined symbols, and adds or removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "treats spaces in a way of its own"),
        ({"model_type": "word", "vocab_size": 20}, "is neither BPE nor unigram"),
    ],
)
def test_a_model_without_an_equal_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        write_tokenizer(tmp_path, trained(**options), Use(10))


@pytest.mark.parametrize("kind", WRITERS)
def test_tokenizers_of_the_library_go_and_come_as_they_are(tmp_path: Path, kind: str) -> None:
    ours = load_tokenizer(WRITERS[kind](tmp_path / "made"))
    theirs = exchanged(ours, tmp_path / "out")
    lines = [line for line in corpus() if "<" not in line and "[" not in line][:500]
    assert [line for line in lines if theirs.encode(line, add_special_tokens=False) != ours.encode(line)] == []
    again = read_tokenizer(tmp_path / "out")
    assert (again.special, again.vocab_size) == (ours.special, ours.vocab_size)
    assert all(again.encode(line) == ours.encode(line) for line in lines)


def test_a_sentencepiece_model_comes_back_unless_its_description_was_changed(ours: Tokenizer, tmp_path: Path) -> None:
    exchanged(ours, tmp_path / "out")
    assert read_tokenizer(tmp_path / "out").content == ours.content
    described = tmp_path / "out" / "tokenizer.json"
    described.write_text(described.read_text().replace('"<tool>"', '"<tuul>"'))
    changed = read_tokenizer(tmp_path / "out")
    assert changed.file == "tokenizer.json" and changed.vocab_size == ours.vocab_size


# -- symbols that a BERT needs and its tokenizer lacks --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SentencePiece's", "GPT-2's"])
def test_symbols_that_the_tokenizer_lacks_stand_behind_it(tmp_path: Path, kind: str) -> None:
    """AutoTokenizer puts them around texts, as the model was trained; imported again they have the same ids."""
    ours = trained() if kind == "SentencePiece's" else load_tokenizer(WRITERS["byte-level"](tmp_path / "made"))
    write_run(tmp_path / "run", BERT, ours, "bert")
    export(tmp_path / "run", tmp_path / "out", say=lambda _: None)
    words = vocabulary_of(run_config(tmp_path / "run"), ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.special["mask"] == ours.vocab_size and len(theirs) == words.size == ours.vocab_size + 3
    assert all(getattr(theirs, f"{role}_token_id") == words.special[role] for role in ("mask", "cls", "sep"))
    cls, sep, one, two = words.special["cls"], words.special["sep"], ours.encode("the fox"), ours.encode("a dog")
    given = theirs("the fox", "a dog")
    assert given["input_ids"] == [cls, *one, sep, *two, sep]
    assert given["token_type_ids"] == [0] * (len(one) + 2) + [1] * (len(two) + 1)
    import_folder(tmp_path / "out", tmp_path / "again", say=lambda _: None)
    again = run_tokenizer(tmp_path / "again")
    assert vocabulary_of(run_config(tmp_path / "again"), again) == words
    assert again.encode("the fox") == one and again.file == ours.file
    assert kind == "GPT-2's" or again.content == ours.content


def test_symbols_that_would_have_no_name_are_refused(tmp_path: Path) -> None:
    plain = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    ours = trained(user_defined_symbols=["<mask>", "[MASK]"], **plain)
    write_run(tmp_path / "run", BERT, ours, "bert")
    with pytest.raises(UserError, match="has no mask symbol, and its ids or pieces leave no place for one"):
        export(tmp_path / "run", tmp_path / "out", say=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_byte_level_tokenizer_keeps_its_offsets_within_a_frame(tmp_path: Path) -> None:
    ours = load_tokenizer(WRITERS["byte-level"](tmp_path / "made"))
    uses = {"bare": Use(10), "framed": Use(10, closing="eos", special=ours.special)}
    theirs = [exchanged(ours, tmp_path / name, use) for name, use in uses.items()]
    bare, framed = (tokenizer("the quick fox", return_offsets_mapping=True) for tokenizer in theirs)
    assert framed["input_ids"] == [*bare["input_ids"], ours.eos]
    assert framed["offset_mapping"][:-1] == bare["offset_mapping"]
