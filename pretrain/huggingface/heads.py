"""What config.json says of a task's classes: `id2label`, `label2id`, `problem_type`."""

from __future__ import annotations

from typing import Any

from pretrain.config.objective import TASKS, ObjectiveConfig
from pretrain.huggingface.architecture import Inexpressible, Json
from pretrain.tasks.labels import LabelSet
from pretrain.tasks.tagged import is_tag

PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}
# Fields of ours that decide what `predict` makes of the outputs, or how it reads a file, and that config.json cannot have.
UNSAID = ("version_2", "question_length", "answer_length", "best", "overlap", "texts", "label", "template")


def write_labels(kind: str, labels: LabelSet) -> Json:
    """labels: of a task's run; of multiple choice the numbers of the choices."""
    theirs: Json = {"problem_type": PROBLEMS[kind]} if kind in PROBLEMS else {}
    names = ("LABEL_0",) if kind == "regression" else labels.names
    if names:
        theirs["id2label"] = {str(number): name for number, name in enumerate(names)}
        theirs["label2id"] = {name: number for number, name in enumerate(names)}
    return theirs


def read_labels(kinds: tuple[str, ...], theirs: Json) -> tuple[str, LabelSet]:
    """Of the kinds of objective that a class is for the one that config.json tells of, and its classes. Raises
    Inexpressible."""
    kind = kinds[0]
    if kind not in TASKS or kind == "question-answering":
        return kind, LabelSet(())
    names = _names(theirs)
    if kind == "classification":
        kind = _of_sequence(theirs, len(names))
    if kind == "multiple-choice":
        names = tuple(map(str, range(len(names))))
    if kind == "tagging":
        for name in names:
            if not is_tag(name):
                raise Inexpressible("id2label", name, "a tag can be O, B-type or I-type")
    return kind, LabelSet(() if kind == "regression" else names)


def _of_sequence(theirs: Json, count: int) -> str:
    """Classification or regression, as transformers decides where nothing is told."""
    problem = theirs.get("problem_type")
    if problem not in (None, *PROBLEMS.values()):
        raise Inexpressible("problem_type", problem, f"it can be {' or '.join(map(repr, PROBLEMS.values()))}")
    if problem != "regression" and count > 1:
        return "classification"
    if count > 1:
        raise Inexpressible("id2label", theirs.get("id2label"), "regression has one number")
    return "regression"


def _names(theirs: Json) -> tuple[str, ...]:
    """The classes in the order of the outputs; transformers' own names where none are given."""
    told: Any = theirs.get("id2label")
    if told is None:
        return tuple(f"LABEL_{number}" for number in range(int(theirs.get("num_labels", 2))))
    names = tuple(str(told[str(number)]).strip() for number in range(len(told)))
    if not names or not all(names) or len(set(names)) < len(names):
        raise Inexpressible("id2label", told, "it can name each class once")
    return names


def left_out(objective: ObjectiveConfig) -> list[str]:
    """For people: what of the objective does not go with the model."""
    default = ObjectiveConfig()
    told = [
        f"objective.{name} {value} is left out: config.json has no place for it"
        for name in UNSAID
        if (value := getattr(objective, name)) != getattr(default, name)
    ]
    if objective.pairs == "order":
        told.append("objective.pairs order is left out: config.json does not tell it from next")
    return told
