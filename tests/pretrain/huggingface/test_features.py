"""Frozen features: `predict --features` writes what transformers' own model has as hidden states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pretrain.errors import UserError
from pretrain.features import chosen_layers
from pretrain.huggingface.export import export
from pretrain.huggingface.importing import import_folder
from pretrain.huggingface.vocabulary import Use, write_tokenizer
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import load_tokenizer
from tests.pretrain import running
from tests.pretrain.huggingface.models import COMMON, GPT2, LENGTH, LLAMA_SIZES, random_weights, write_run
from tests.pretrain.huggingface.test_predictions import SENTENCES
from tests.pretrain.tokenization.samples import write_wordpiece

TEXTS = ["The quick brown fox", "birds sing", "birds, birds and birds sing a long, long song of the lazy dog"]


def quiet(_: str) -> None:
    pass


class Imported:
    """A random BERT of transformers' without heads, with a cased WordPiece vocabulary, and the run that it becomes."""

    def __init__(self, folder: Path) -> None:
        words = load_tokenizer(write_wordpiece(folder / "vocabulary", lower=False))
        options = {**COMMON, **LLAMA_SIZES, "vocab_size": words.vocab_size}
        self.model = random_weights(transformers.BertModel(transformers.BertConfig(**options)), 5)
        self.model.save_pretrained(folder / "theirs")
        write_tokenizer(folder / "theirs", words, Use(LENGTH, True, "cls", "sep", 1, words.special))
        import_folder(folder / "theirs", folder / "run", say=quiet)
        self.run, self.tokenizer = folder / "run", transformers.AutoTokenizer.from_pretrained(folder / "theirs")

    @torch.inference_mode()
    def states(self, texts: Any, **options: Any) -> tuple[np.ndarray[Any, Any], Any]:
        """(layers, N, S, H), and what the tokenizer gave."""
        given = self.tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt", **options)
        return torch.stack(self.model(**given, output_hidden_states=True).hidden_states).numpy(), given


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return Imported(tmp_path_factory.mktemp("features"))


def features(run: Path, path: Path, *options: str) -> list[np.ndarray[Any, Any]]:
    out = path.with_suffix(".out")
    out.unlink(missing_ok=True)
    ran = running.command("predict", run, "--input", path, "--out", out, *options)
    assert ran.code == 0, ran.told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(len(lines)))
    return [np.array(line["features"]) for line in lines]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.tsv"
    path.write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))
    return path


def test_a_vector_of_each_text(bert: Imported, texts: Path) -> None:
    states, given = bert.states(TEXTS)
    for number, found in enumerate(features(bert.run, texts, "--features=-2:,0", "--pool", "first")):
        assert np.allclose(found, states[[-2, -1, 0], number, 0], atol=1e-5)
    held = given["attention_mask"].numpy()[None, :, :, None]
    mean = (states * held).sum(2) / held.sum(2)
    for number, found in enumerate(features(bert.run, texts, "--features=-1", "--batch-size", "2")):
        assert found.shape == (1, 24) and np.allclose(found[0], mean[-1, number], atol=1e-5)
        assert not np.allclose(found[0], states[-1, number].mean(0), atol=1e-3) or held[0, number].all()


def test_a_vector_of_each_token(bert: Imported, texts: Path, tmp_path: Path) -> None:
    """Of a text of all that the model sees; of CoNLL of each word's first piece, also where it takes several windows."""
    states, given = bert.states(TEXTS)
    for number, found in enumerate(features(bert.run, texts, "--features=1", "--pool", "tokens")):
        count = int(given["attention_mask"][number].sum())
        assert found.shape == (1, count, 24) and np.allclose(found[0], states[1, number, :count], atol=1e-5)
    path = tmp_path / "words.conll"
    path.write_text("\n\n".join("\n".join(words) for words in (*SENTENCES, ["birds"] * 40)) + "\n")
    states, given = bert.states(SENTENCES, is_split_into_words=True)
    *found, long = features(bert.run, path, "--features=3", "--pool", "tokens")
    for number, (words, values) in enumerate(zip(SENTENCES, found, strict=True)):
        first = [given.word_ids(number).index(word) for word in range(len(words))]
        assert np.allclose(values[0], states[3, number, first], atol=1e-5)
    assert long.shape == (1, 40, 24) and np.abs(long).min(axis=(0, 2)).all(), "every word of all windows has a vector"


def test_a_decoders_last_layer_has_the_final_norm(tmp_path: Path, tokenizer: Tokenizer, texts: Path) -> None:
    """And its last token stands for the text; a fine-tuned run's head is left aside."""
    write_run(tmp_path / "run", GPT2, tokenizer, objective={"kind": "classification"}, labels=("a", "b"))
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    found = features(tmp_path / "run", texts, "--features=0:", "--pool", "first")
    for text, values in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            given = words(text, truncation=True, max_length=LENGTH, return_tensors="pt")
            states = theirs(**given, output_hidden_states=True).hidden_states
        assert np.allclose(values, torch.stack(states)[:, 0, -1].numpy(), atol=1e-5)


def test_layers_are_named_as_python_does() -> None:
    assert chosen_layers("-1", 12) == [12] and chosen_layers("-4:", 12) == [9, 10, 11, 12]
    assert chosen_layers("0, 6,12", 12) == [0, 6, 12] and chosen_layers(":2,5", 12) == [0, 1, 5]
    for wrong in ("13", "-14", "a", "", "5:5", "1:2:3:4", "1:9:2"):
        with pytest.raises(UserError, match=r"names no layer; there are 0 \(the embeddings\) to 12"):
            chosen_layers(wrong, 12)


def test_what_cannot_be_is_refused(bert: Imported, texts: Path) -> None:
    out = texts.with_suffix(".out")
    given = ("predict", bert.run, "--input", texts, "--out", out)
    running.assert_refused(running.command(*given, "--features=9"), "--features 9", "0 (the embeddings) to 3")
    running.assert_refused(running.command(*given, "--pool", "mean"), "--pool: has no effect without --features")
    assert not out.exists()
