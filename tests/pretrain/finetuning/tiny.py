"""A tiny pre-trained BERT and GPT, and files of examples that they can learn: what one word says decides."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

from tests.pretrain import running

WORDS = (
    *("path", "name", "value", "error", "file", "line", "node", "list"),
    *("text", "code", "data", "self", "index", "count", "item"),
)
BERT = (
    "model={kind: bert, num_layers: 2, hidden_size: 32, num_heads: 4, norm_position: post, dropout: 0.1}",
    "objective={kind: masked, pairs: order}",
    "schedule.total=4 steps",
)
CONFIG = """
version: 1
model: {initial: INITIAL, dropout: 0.1}
data: {train: FOLDER/train.EXT, validation: FOLDER/dev.EXT, seq_length: 32}
objective: {kind: KIND}
batch: {size: 16, micro_size: 4}
optimizer: {learning_rate: 3.0e-3, betas: [0.9, 0.999], weight_decay: 0.01, clip_norm: 1.0}
schedule: {kind: linear, warmup: 0.5 epochs, total: 8 epochs, final_fraction: 0.0}
parallel: {zero: 0}
precision: {compute: fp32, compile: never}
checkpoint: {every: 2 epochs, keep_last: 9}
monitor: {log_every: 1 steps, validate_every: 2 epochs, tensorboard: false}
run: {dir: RUN, seed: 1}
"""
EXTENSIONS = {
    "tagging": "conll",
    "question-answering": "json",
    "multiple-choice": "jsonl",
    "regression": "jsonl",
    "instruction": "jsonl",
}


@functools.cache
def bert(shards: Path) -> Path:
    return _pretrained(shards, "bert", *BERT)


@functools.cache
def gpt(shards: Path) -> Path:
    return _pretrained(shards, "gpt", "schedule.total=4 steps")


def _pretrained(shards: Path, name: str, *overrides: str) -> Path:
    ran = running.train(shards.parent / name, shards, *overrides)
    assert ran.code == 0, ran.told
    return shards.parent / name / "run"


def words(draw: random.Random, least: int = 3, most: int = 9) -> list[str]:
    return [draw.choice(WORDS) for _ in range(draw.randint(least, most))]


def write(folder: Path, kind: str, part: str, count: int) -> Path:
    """A file of examples of the kind."""
    draw = random.Random(f"{kind} {part}")
    path = folder / f"{part}.{EXTENSIONS.get(kind, 'tsv')}"
    path.write_text(getattr(Writers, kind.replace("-", "_"))(draw, count))
    return path


class Writers:
    @staticmethod
    def instruction(draw: random.Random, count: int) -> str:
        rows = []
        for _ in range(count):
            asked, answer = draw.choice([("return", "self value"), ("import", "path"), ("class", "name node item")])
            turns = [("user", f"{draw.choice(WORDS)} {asked}"), ("assistant", answer)]
            if draw.random() < 0.3:
                turns = [("system", "code"), *turns, ("user", "import"), ("assistant", "path")]
            row = {"messages": [{"role": role, "content": text} for role, text in turns]}
            rows.append(json.dumps(row if len(turns) > 2 else {"prompt": turns[0][1], "response": answer}) + "\n")
        return "".join(rows)

    @staticmethod
    def classification(draw: random.Random, count: int) -> str:
        rows = []
        for _ in range(count):
            label, text = draw.choice(["no", "yes", "maybe"]), words(draw)
            text[draw.randrange(len(text))] = {"no": "return", "yes": "import", "maybe": "class"}[label]
            rows.append(f"{label}\t{' '.join(text)}\n")
        return "label\ttext\n" + "".join(rows)

    @staticmethod
    def regression(draw: random.Random, count: int) -> str:
        rows = []
        for _ in range(count):
            text, value = words(draw), draw.choice([-1.0, 0.0, 1.0])
            text[draw.randrange(len(text))] = {-1.0: "return", 0.0: "import", 1.0: "class"}[value]
            rows.append(json.dumps({"text": " ".join(text), "label": value + draw.gauss(0, 0.05)}) + "\n")
        return "".join(rows)

    @staticmethod
    def multiple_choice(draw: random.Random, count: int) -> str:
        rows = []
        for _ in range(count):
            choices = [" ".join(words(draw, 1, 3)) for _ in range(draw.choice([2, 3]))]
            answer = draw.randrange(len(choices))
            choices[answer] += " return"
            rows.append(
                json.dumps({"question": " ".join(words(draw, 1, 3)), "choices": choices, "answer": answer}) + "\n"
            )
        return "".join(rows)

    @staticmethod
    def tagging(draw: random.Random, count: int) -> str:
        sentences = []
        for _ in range(count):
            lines = [(word, "O") for word in words(draw, 3, draw.choice([8, 8, 8, 40]))]
            place = draw.randrange(len(lines))
            lines[place : place + 1] = [("return", "B-END"), ("self", "I-END")]
            sentences.append("".join(f"{word}\t{tag}\n" for word, tag in lines))
        return "\n".join(sentences)

    @staticmethod
    def question_answering(draw: random.Random, count: int) -> str:
        paragraphs = []
        for number in range(count):
            text = words(draw, 5, 40)
            place = draw.randrange(len(text))
            text[place] = "return"
            start = len(" ".join(text[:place])) + (1 if place else 0)
            answer = {"text": "return", "answer_start": start}
            asked = {"id": f"q{number}", "question": "what ends?", "answers": [answer]}
            paragraphs.append({"context": " ".join(text), "qas": [asked]})
        return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]})


def write_config(folder: Path, kind: str, initial: Path, train: int | None = None, dev: int = 21) -> Path:
    """The task's config and files in a folder; passages give several windows each, so fewer of them."""
    train = train or (48 if kind == "question-answering" else 160)
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("dev", dev)):
        write(folder, kind, part, count)
    objective = kind + (", overlap: 8, question_length: 8, answer_length: 4" if kind == "question-answering" else "")
    text = CONFIG.replace("KIND", objective + (", overlap: 8" if kind == "tagging" else ""))
    for old, new in {"INITIAL": initial, "FOLDER": folder, "EXT": EXTENSIONS.get(kind, "tsv")}.items():
        text = text.replace(old, str(new))
    path = folder / "config.yaml"
    path.write_text(text.replace("RUN", str(folder / "run")))
    return path
