"""A fine-tuned folder that was exported predicts by transformers alone what `predict` says: text in, labels out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pretrain.huggingface.export import export
from pretrain.huggingface.importing import import_folder
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import load_tokenizer
from tests.pretrain import running
from tests.pretrain.huggingface.models import BERT, GPT2, write_run
from tests.pretrain.tokenization.samples import write_wordpiece

TEXTS = [
    ("The quick brown F\u00f6x", "jumps over"),
    ("def RETURN(self): import class", "a lazy dog, 1234"),
    ("birds sing", "birds, birds and birds sing a long, long song of the quick brown fox over the lazy dog"),
    ("\u6f22\u5b57 and \u00e9", "x"),
]
SENTENCES = [["The", "F\u00f6x", "jumped", "over", "1234567890"], ["birds", "sing", "!"], ["def", "f(x):", "RETURN"]]
PASSAGE = "The Quick fox, that is Br\u00f6wn, jumps over a lazy dog"
QUESTIONS = ["Who jumps?", "Over what does it jump?", "which colour"]


@pytest.fixture(scope="module")
def uncased(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_wordpiece(tmp_path_factory.mktemp("vocabulary") / "uncased", lower=True))


def exported(
    folder: Path, options: dict[str, Any], tokenizer: Tokenizer, objective: dict[str, Any], *labels: str
) -> Any:
    """The run, and the folder's model and tokenizer as transformers has them."""
    wide = {**options, "initial_scale": 0.3}  # so that what is random differs from text to text
    write_run(folder / "run", wide, tokenizer, objective=objective, labels=labels, length=128)
    export(folder / "run", folder / "out", say=lambda _: None)
    class_name = json.loads((folder / "out" / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, class_name).from_pretrained(folder / "out", attn_implementation="eager").eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder / "out")


def predicted(run: Path, path: Path) -> list[dict[str, Any]]:
    out = run.parent / f"{run.name}.jsonl"
    ran = running.command("predict", run, "--input", path, "--out", out)
    assert ran.code == 0, ran.told
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("body", ["bert", "gpt2"])
@torch.inference_mode()
def test_classes_of_pairs(tmp_path: Path, uncased: Tokenizer, tokenizer: Tokenizer, body: str) -> None:
    """A decoder's texts end as it was trained on; what is imported again says the same once more."""
    options, words = (BERT, uncased) if body == "bert" else (GPT2, tokenizer)
    model, theirs = exported(tmp_path, options, words, {"kind": "classification"}, "bad", "good", "neither")
    (tmp_path / "texts.tsv").write_text("text\tmore\n" + "".join(f"{one}\t{two}\n" for one, two in TEXTS))
    lines = predicted(tmp_path / "run", tmp_path / "texts.tsv")
    given = theirs(*map(list, zip(*TEXTS, strict=True)), padding=True, truncation=True, return_tensors="pt")
    assert theirs.model_max_length == 128 and ("token_type_ids" in given) == (body == "bert")
    chances = model(**given).logits.softmax(dim=1)
    assert len({json.dumps(line["scores"]) for line in lines}) == len(lines), "what is random differs from text to text"
    for line, row in zip(lines, chances, strict=True):
        assert line["label"] == model.config.id2label[int(row.argmax())]
        expected = {name: row[number].item() for number, name in model.config.id2label.items()}
        assert line["scores"] == pytest.approx(expected, abs=1e-5)
    import_folder(tmp_path / "out", tmp_path / "again", say=lambda _: None)
    assert predicted(tmp_path / "again", tmp_path / "texts.tsv") == lines


@torch.inference_mode()
def test_tags_of_words(tmp_path: Path, uncased: Tokenizer) -> None:
    model, theirs = exported(tmp_path, BERT, uncased, {"kind": "tagging"}, "B-a", "B-b", "I-a", "I-b", "O")
    (tmp_path / "words.txt").write_text("\n\n".join("\n".join(sentence) for sentence in SENTENCES) + "\n")
    lines = predicted(tmp_path / "run", tmp_path / "words.txt")
    given = theirs(SENTENCES, is_split_into_words=True, padding=True, return_tensors="pt")
    found = model(**given).logits.argmax(dim=2)
    for number, (line, sentence) in enumerate(zip(lines, SENTENCES, strict=True)):
        words = given.word_ids(number)
        tags = [model.config.id2label[int(found[number, words.index(word)])] for word in range(len(sentence))]
        before = ["O", *tags[:-1]]  # I- that continues nothing begins an entity
        pairs = zip(before, tags, strict=True)
        assert line["tags"] == [f"B-{tag[2:]}" if tag[0] == "I" and last[2:] != tag[2:] else tag for last, tag in pairs]
    assert len({tag for line in lines for tag in line["tags"]}) > 1


@torch.inference_mode()
def test_answers_to_questions(tmp_path: Path, uncased: Tokenizer) -> None:
    objective = {"kind": "question-answering", "overlap": 8, "best": 64, "answer_length": 6}
    model, theirs = exported(tmp_path, BERT, uncased, objective)
    asked = [{"id": f"q{n}", "question": question} for n, question in enumerate(QUESTIONS)]
    paragraph = {"context": PASSAGE, "qas": [{**one, "answers": []} for one in asked]}
    (tmp_path / "asked.json").write_text(json.dumps({"data": [{"title": "", "paragraphs": [paragraph]}]}))
    lines = predicted(tmp_path / "run", tmp_path / "asked.json")
    for line, question in zip(lines, QUESTIONS, strict=True):
        given = theirs(question, PASSAGE, return_tensors="pt", return_offsets_mapping=True)
        [offsets], segments = given.pop("offset_mapping").tolist(), given.sequence_ids(0)
        found = model(**given)
        places = [place for place, segment in enumerate(segments) if segment == 1]
        spans = [(start, end) for start in places for end in places if start <= end < start + 6]
        scores = [(found.start_logits[0, a] + found.end_logits[0, b]).item() for a, b in spans]
        start, end = spans[max(range(len(spans)), key=scores.__getitem__)]
        assert line["answer"] == PASSAGE[offsets[start][0] : offsets[end][1]]
        assert line["score"] == pytest.approx(max(scores), abs=1e-4)
    assert len({line["score"] for line in lines}) == len(lines)
