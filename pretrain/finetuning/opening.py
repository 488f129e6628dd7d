"""A run's labelled examples, read and checked before anything else starts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.finetuning.examples import Examples
from pretrain.finetuning.instruction import Instruction
from pretrain.finetuning.sequences import Format
from pretrain.finetuning.tasks import (
    Classification,
    MultipleChoice,
    QuestionAnswering,
    Regression,
    Tagging,
    Task,
)
from pretrain.tasks.alignment import IGNORED
from pretrain.tasks.labels import LabelSet
from pretrain.tasks.lines import Findings
from pretrain.tokenization.base import Tokenizer
from pretrain.vocabulary import Vocabulary

LABELS = "labels.json"

KINDS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "multiple-choice": MultipleChoice,
    "tagging": Tagging,
    "question-answering": QuestionAnswering,
    "instruction": Instruction,
}


class Opened(NamedTuple):
    """The task, its training examples, and those that are held out."""

    task: Task
    train: Examples
    validation: Examples | None


def open_examples(config: Config, tokenizer: Tokenizer, vocabulary: Vocabulary) -> Opened:
    """Raises UserError, with file and line, for what is wrong with the files."""
    kind, path = KINDS[config.objective.kind], Path(str(config.data.train))
    _check_file("data.train", path)
    findings = Findings(config.objective.strict)
    items = list(kind.read(config.objective, path, True, findings))
    labels = kind.labels_of(config.objective, path, items, findings)
    task = task_of(config, tokenizer, vocabulary, labels)
    train = Examples.read(task, path, items, findings)
    return Opened(task, train, None if config.data.validation is None else _held_out(config, task))


def task_of(config: Config, tokenizer: Tokenizer, vocabulary: Vocabulary, labels: LabelSet) -> Task:
    model = config.model
    parts = config.parallel.tensor * config.parallel.context
    form = Format(tokenizer, vocabulary, model.causal, config.data.seq_length, model.num_segments, parts)
    return KINDS[config.objective.kind](config.objective, form, labels)


def _held_out(config: Config, task: Task) -> Examples:
    path = Path(str(config.data.validation))
    _check_file("data.validation", path)
    return read_examples(task, path, Findings(config.objective.strict))


def read_examples(task: Task, path: Path, findings: Findings) -> Examples:
    """A file's labelled examples, of labels that training had."""
    return Examples.read(task, path, list(task.read(task.config, path, True, findings)), findings)


def class_weights(task: Task, examples: Examples) -> list[float] | None:
    """Of each class in the loss. Raises UserError where there are not as many as classes."""
    wished = task.config.class_weights
    if wished is None:
        return None
    count = task.num_outputs
    if isinstance(wished, list):
        if len(wished) != count or min(wished) <= 0:
            raise UserError(
                f"objective.class_weights: {wished}; give one above 0 for each of {', '.join(task.labels.names)}"
            )
        return wished
    held = Counter(int(target) for sample in examples.samples for target in sample.targets if target != IGNORED)
    total = sum(held.values())
    return [total / (count * max(held[label], 1)) for label in range(count)]  # as scikit-learn balances


def keep_labels(labels: LabelSet) -> bytes:
    """What a run's folder keeps of its task: the classes in the order of the outputs."""
    return json.dumps({"labels": list(labels.names)}, ensure_ascii=False, indent=1).encode() + b"\n"


def run_labels(run: Path) -> LabelSet:
    """The classes of a trained run. Raises UserError where its folder lacks them."""
    path = run / LABELS
    try:
        names = json.loads(path.read_text())["labels"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("labels must be a list of texts")
        return LabelSet(tuple(names))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; put it back from the run") from error


def _check_file(field: str, path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{field}: {path} is a folder; labelled examples are one file")
    if not path.is_file():
        raise UserError(f"{field}: there is no file {path}")
