"""Score a prediction file against a gold file: every gold id exactly once, else an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pretrain.tasks.answers import AnswerScores, Row, scored
from pretrain.tasks.choices import Choice
from pretrain.tasks.classes import ClassCounts
from pretrain.tasks.correlation import NumberPairs
from pretrain.tasks.entities import EntityCounts
from pretrain.tasks.labelled import Classified, Rated
from pretrain.tasks.labels import label_of, number_of, sorted_labels
from pretrain.tasks.lines import excerpt, fail
from pretrain.tasks.pairs import Pair
from pretrain.tasks.predictions import read_predictions
from pretrain.tasks.questions import Question
from pretrain.tasks.tables import check_unique
from pretrain.tasks.tagged import Sentence, is_tag

Gold = Classified | Rated | Choice | Sentence | Question | Pair
Found = list[tuple[int, dict[str, Any]]]  # line and object of each prediction, in the gold file's order


def matched(path: str | Path, kind: str, gold: Sequence[Gold]) -> Found:
    """The predictions in the gold examples' order. Raises UserError for an id that is missing, unknown or there twice."""
    wanted = {str(example.id): number for number, example in enumerate(gold)}
    seen: dict[str, int] = {}
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    line = 1
    for line, value in read_predictions(path, kind):
        name = str(value["id"])
        check_unique(path, line, name, seen)
        if name not in wanted:
            fail(
                path, line, f"the id {excerpt(name)} is none of the gold file's {len(wanted):,}; predict its rows only"
            )
        found[name] = (line, value)
    missing = [name for name in wanted if name not in found]
    if missing:
        fail(
            path, line, f"{len(missing):,} gold ids have no prediction, the first is {excerpt(missing[0])}; predict all"
        )
    return [found[name] for name in wanted]


def score_classes(path: str | Path, gold: Sequence[Classified]) -> dict[str, float]:
    """Accuracy, macro F1, Matthews, and F1 of the second class where there are two."""
    found = matched(path, "label", gold)
    predicted = [label_of(path, line, value["label"]) for line, value in found]
    names = sorted_labels([*predicted, *(str(example.label) for example in gold)])
    number = {name: place for place, name in enumerate(names)}
    counts = ClassCounts.of(
        [number[str(example.label)] for example in gold], [number[label] for label in predicted], len(names)
    )
    scores = {"accuracy": counts.accuracy, "macro_f1": counts.macro_f1, "matthews": counts.matthews}
    return {**scores, "f1": counts.f1()} if len(names) == 2 else scores


def score_numbers(path: str | Path, gold: Sequence[Rated]) -> dict[str, float]:
    """Pearson's and Spearman's correlation."""
    predicted = [number_of(path, line, value["label"]) for line, value in matched(path, "label", gold)]
    pairs = NumberPairs.of([_known(example.value) for example in gold], predicted)
    return {"pearson": pairs.pearson, "spearman": pairs.spearman}


def score_choices(path: str | Path, gold: Sequence[Choice]) -> dict[str, float]:
    """Accuracy; a label is the number of a choice from 0."""
    found = matched(path, "label", gold)
    for (line, value), example in zip(found, gold, strict=True):
        if type(value["label"]) is not int or not 0 <= value["label"] < len(example.choices):
            fail(path, line, f"the label of {example.id} must be the number of a choice, from 0; mend it")
    return {
        "accuracy": _share(value["label"] == example.answer for (_, value), example in zip(found, gold, strict=True))
    }


def score_tags(path: str | Path, gold: Sequence[Sentence]) -> dict[str, Any]:
    """Entity precision, recall and F1, by conlleval's reading and strictly, and F1 by type."""
    found = matched(path, "tags", gold)
    for (line, value), example in zip(found, gold, strict=True):
        if len(value["tags"]) != len(example.tokens):
            what = f"{len(value['tags'])} tags for the {len(example.tokens)} tokens of sentence {example.id}"
            fail(path, line, f"{what}; predict one tag for each token")
        if wrong := [tag for tag in value["tags"] if not is_tag(tag)]:
            fail(path, line, f"the tag {excerpt(wrong[0])} is not BIO; use O, B-type and I-type")
    truth = [_known(example.tags) for example in gold]
    guess = [value["tags"] for _, value in found]
    default, strict = (EntityCounts.of(truth, guess, strict) for strict in (False, True))
    return {
        "precision": default.micro.precision,
        "recall": default.micro.recall,
        "f1": default.micro.f1,
        "strict_f1": strict.micro.f1,
        "f1_by_type": {kind: scores.f1 for kind, scores in default.by_type().items()},
    }


def score_answers(path: str | Path, gold: Sequence[Question], version_2: bool = False) -> dict[str, float]:
    """Exact match and F1 in percent; with v2 also with and without answer, and by the best threshold on "score"."""
    rows: list[Row] = []
    for (line, value), question in zip(matched(path, "answer", gold), gold, strict=True):
        if value["answer"] not in question.context:
            fail(path, line, f"the answer to {question.id} is no part of its passage; copy it word for word")
        score = value.get("no_answer_score", 0.0)
        if isinstance(score, bool) or not isinstance(score, int | float):
            fail(path, line, f'the "no_answer_score" of {question.id} must be a number; mend it')
        rows += scored(value["answer"], [answer.text for answer in question.answers], version_2, float(score)).rows
    total = AnswerScores(tuple(rows))
    scores = {"exact": total.exact, "f1": total.f1}
    if version_2:
        has, none = total.only(True), total.only(False)
        exact, f1 = total.best_exact(), total.best_f1()
        scores |= {"has_answer_exact": has.exact, "has_answer_f1": has.f1, "no_answer_exact": none.exact}
        scores |= {"best_exact": exact.score, "best_exact_threshold": exact.threshold}
        scores |= {"best_f1": f1.score, "best_f1_threshold": f1.threshold}
    return scores


def score_texts(path: str | Path, gold: Sequence[Pair]) -> dict[str, float]:
    """Share of texts that equal their target, white space around them left out (BLEU is sacrebleu's)."""
    found = matched(path, "text", gold)
    return {
        "exact": _share(
            value["text"].strip() == _known(example.target).strip()
            for (_, value), example in zip(found, gold, strict=True)
        )
    }


SCORERS: dict[str, Callable[..., dict[str, Any]]] = {
    "classification": score_classes,
    "regression": score_numbers,
    "multiple-choice": score_choices,
    "tagging": score_tags,
    "question-answering": score_answers,
    "sequence-to-sequence": score_texts,
}


def _share(right: Iterable[bool]) -> float:
    values = list(right)
    return sum(values) / len(values)


def _known(value: Any) -> Any:
    """A gold value, which readers leave None only where no labels were asked for."""
    if value is None:
        raise ValueError("gold examples must be read with their labels")
    return value
