"""The tasks: what an example is, the sequences that it becomes, and what the model's outputs say of it.

A task reads items from a file, makes one or more samples of each (windows of a long text), and turns the outputs for these
into a prediction and, over all items, into metrics. It knows no tensors: outputs are numpy arrays (P, C), P the places that
the head saw and C its classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.config.objective import ObjectiveConfig
from pretrain.errors import UserError
from pretrain.finetuning.sequences import Array, Format, Sequence
from pretrain.tasks.alignment import (
    IGNORED,
    assembled,
    first_pieces,
    joined,
    passage_room,
    piece_targets,
    windows,
    word_tags,
    words_of_pieces,
)
from pretrain.tasks.answers import AnswerScores, scored
from pretrain.tasks.choices import read_choices
from pretrain.tasks.classes import ClassCounts
from pretrain.tasks.correlation import NumberPairs
from pretrain.tasks.entities import EntityCounts
from pretrain.tasks.floors import commonest, gazetteer, gazetteer_tags, overlap_answer
from pretrain.tasks.labelled import read_classified, read_rated
from pretrain.tasks.labels import LabelSet, given, learned, tag_set
from pretrain.tasks.lines import Findings
from pretrain.tasks.predictions import by_label
from pretrain.tasks.questions import read_questions
from pretrain.tasks.spans import best_spans, merged, span_of_answer, within
from pretrain.tasks.tagged import read_tagged, repaired

CUT = "a text longer than the model's sequence, cut"
NO_PIECES = "a token without word pieces, tagged O"


class Sample(NamedTuple):
    """One sequence (or one for each choice) and its targets: a class, a number, a tag or the next id for each token, or both
    ends."""

    item: int  # number of its item
    rows: tuple[Sequence, ...]
    targets: Array
    about: Any = None  # what the task needs to read the outputs
    window: int = 0  # number of the sample among its item's


class Task(ABC):
    """One kind of examples under one configuration. `labels`: the classes in the order of the outputs."""

    metric: str | None  # by which the best checkpoint is chosen, the higher the better; None: by the loss
    num_rows = 1  # sequences of a sample
    path: Path

    def __init__(self, config: ObjectiveConfig, form: Format, labels: LabelSet) -> None:
        self.config, self.form, self.labels = config, form, labels

    @property
    def num_outputs(self) -> int:
        """C: outputs of each place."""
        return len(self.labels)

    @classmethod
    def labels_of(cls, config: ObjectiveConfig, path: Path, items: Many[Any], findings: Findings) -> LabelSet:
        """The classes of a training file's items."""
        return LabelSet(())

    @classmethod
    @abstractmethod
    def read(cls, config: ObjectiveConfig, path: Path, labelled: bool, findings: Findings) -> Iterator[Any]:
        """The file's items. Raises UserError with file and line."""

    @abstractmethod
    def samples(self, number: int, item: Any, path: Path, findings: Findings) -> list[Sample]:
        """Of the number-th item."""

    @abstractmethod
    def prediction(self, item: Any, samples: Many[Sample], outputs: Many[Array]) -> dict[str, Any]:
        """What the outputs (P, C) of its samples say, as a line of a prediction file."""

    @abstractmethod
    def metrics(self, items: Many[Any], predictions: Many[dict[str, Any]]) -> dict[str, float]:
        """Of all items and their predictions."""

    @abstractmethod
    def floor(self, training: Many[Any], items: Many[Any]) -> dict[str, float]:
        """The metrics that are reached without learning."""

    def _cut(self, sequence: Sequence, path: Path, item: Any, findings: Findings) -> Sequence:
        if sequence.truncated:
            findings.add(path, item.line, CUT)
        return sequence

    def _texts(self, texts: Many[str]) -> Sequence:
        return self.form.joined([self.form.tokenizer.encode(text) for text in texts])


class Classification(Task):
    metric = "accuracy"

    @classmethod
    def labels_of(cls, config: ObjectiveConfig, path: Path, items: Many[Any], findings: Findings) -> LabelSet:
        counts = Counter(item.label for item in items)
        if config.labels is None:
            return learned(path, counts)
        labels, missing = given(path, config.labels, counts)
        for item in items:
            labels.index(item.label, path, item.line)
        for text in missing:
            findings.add(path, 1, text)
        return labels

    @classmethod
    def read(cls, config: ObjectiveConfig, path: Path, labelled: bool, findings: Findings) -> Iterator[Any]:
        return read_classified(path, config.texts, config.label, labelled)

    def samples(self, number: int, item: Any, path: Path, findings: Findings) -> list[Sample]:
        label = IGNORED if item.label is None else self.labels.index(item.label, path, item.line)
        sequence = self._cut(self._texts(item.texts), path, item, findings)
        return [Sample(number, (sequence,), np.array([label]))]

    def prediction(self, item: Any, samples: Many[Sample], outputs: Many[Array]) -> dict[str, Any]:
        chances = softmax(outputs[0][0])
        label = self.labels.names[int(chances.argmax())]
        return {"id": item.id, "label": label, "scores": by_label(self.labels.names, chances.tolist())}

    def metrics(self, items: Many[Any], predictions: Many[dict[str, Any]]) -> dict[str, float]:
        number = {name: place for place, name in enumerate(self.labels.names)}
        gold, found = [number[item.label] for item in items], [number[line["label"]] for line in predictions]
        counts = ClassCounts.of(gold, found, len(number))
        scores = {"accuracy": counts.accuracy, "macro_f1": counts.macro_f1, "matthews": counts.matthews}
        return {**scores, "f1": counts.f1()} if len(number) == 2 else scores

    def floor(self, training: Many[Any], items: Many[Any]) -> dict[str, float]:
        label = commonest(item.label for item in training)
        return self.metrics(items, [{"label": label}] * len(items))


class Regression(Task):
    metric = "spearman"

    @property
    def num_outputs(self) -> int:
        return 1

    @classmethod
    def read(cls, config: ObjectiveConfig, path: Path, labelled: bool, findings: Findings) -> Iterator[Any]:
        return read_rated(path, config.texts, config.label, labelled)

    def samples(self, number: int, item: Any, path: Path, findings: Findings) -> list[Sample]:
        value = np.array([math.nan if item.value is None else item.value], np.float64)
        sequence = self._cut(self._texts(item.texts), path, item, findings)
        return [Sample(number, (sequence,), value.view(np.int64))]

    def prediction(self, item: Any, samples: Many[Sample], outputs: Many[Array]) -> dict[str, Any]:
        return {"id": item.id, "label": float(outputs[0][0, 0])}

    def metrics(self, items: Many[Any], predictions: Many[dict[str, Any]]) -> dict[str, float]:
        gold, found = [item.value for item in items], [line["label"] for line in predictions]
        pairs = NumberPairs.of(gold, found)
        error = float(np.mean((np.array(gold) - np.array(found)) ** 2))
        return {"spearman": pairs.spearman, "pearson": pairs.pearson, "squared_error": error}

    def floor(self, training: Many[Any], items: Many[Any]) -> dict[str, float]:
        mean = float(np.mean([item.value for item in training]))
        return {"squared_error": float(np.mean([(item.value - mean) ** 2 for item in items]))}


class MultipleChoice(Task):
    metric = "accuracy"

    @property
    def num_outputs(self) -> int:
        return 1

    @classmethod
    def labels_of(cls, config: ObjectiveConfig, path: Path, items: Many[Any], findings: Findings) -> LabelSet:
        return LabelSet(tuple(map(str, range(max(len(item.choices) for item in items)))))

    @classmethod
    def read(cls, config: ObjectiveConfig, path: Path, labelled: bool, findings: Findings) -> Iterator[Any]:
        return read_choices(path, labelled)

    @property
    def num_rows(self) -> int:  # type: ignore[override]
        return len(self.labels)

    def samples(self, number: int, item: Any, path: Path, findings: Findings) -> list[Sample]:
        """A row for each choice: the context and question with it."""
        if len(item.choices) > self.num_rows:
            raise UserError(
                f"{path}:{item.line}: {len(item.choices)} choices where training has at most {self.num_rows}."
            )
        before = " ".join(filter(None, (item.context, item.question)))
        rows = tuple(self._cut(self._texts((before, choice)), path, item, findings) for choice in item.choices)
        return [Sample(number, rows, np.array([IGNORED if item.answer is None else item.answer]))]

    def prediction(self, item: Any, samples: Many[Sample], outputs: Many[Array]) -> dict[str, Any]:
        chances = softmax(outputs[0][: len(item.choices), 0])
        return {"id": item.id, "label": int(chances.argmax()), "scores": chances.tolist()}

    def metrics(self, items: Many[Any], predictions: Many[dict[str, Any]]) -> dict[str, float]:
        right = [item.answer == line["label"] for item, line in zip(items, predictions, strict=True)]
        return {"accuracy": float(np.mean(right))}

    def floor(self, training: Many[Any], items: Many[Any]) -> dict[str, float]:
        return {"accuracy": float(np.mean([1 / len(item.choices) for item in items]))}


class Tagging(Task):
    """A word's first piece is tagged; a sentence that is too long in windows, each piece by the one around it most."""

    metric = "f1"

    @classmethod
    def labels_of(cls, config: ObjectiveConfig, path: Path, items: Many[Any], findings: Findings) -> LabelSet:
        return tag_set(tag for item in items for tag in item.tags)

    @classmethod
    def read(cls, config: ObjectiveConfig, path: Path, labelled: bool, findings: Findings) -> Iterator[Any]:
        return read_tagged(path, labelled, findings)

    def samples(self, number: int, item: Any, path: Path, findings: Findings) -> list[Sample]:
        text, word_starts, word_ends = joined(item.tokens)
        ids, offsets = self.form.tokenizer.encode_with_offsets(text)
        places = np.array(offsets, np.int64).reshape(-1, 2)
        first = first_pieces(words_of_pieces(places[:, 0], places[:, 1], word_starts, word_ends), len(item.tokens))
        for _ in range(int((first < 0).sum())):
            findings.add(path, item.line, NO_PIECES)
        targets = np.full(len(ids), IGNORED)
        if item.tags is not None:
            targets = piece_targets(first, [self.labels.index(t, path, item.line) for t in item.tags], len(ids))
        room = self.form.length - self.form.num_special(1)
        found = windows(len(ids), room, min(self.config.overlap, room - 1))
        made = []
        for window, (start, end) in enumerate(found):
            sequence = self.form.joined([ids[start:end]])
            row = np.full(len(sequence.ids), IGNORED)
            row[sequence.begins[0] :][: end - start] = targets[start:end]
            made.append(Sample(number, (sequence,), row, (first, len(ids), (start, end)), window))
        return made

    def prediction(self, item: Any, samples: Many[Sample], outputs: Many[Array]) -> dict[str, Any]:
        first, count, _ = samples[0].about
        predicted = []
        for sample, output in zip(samples, outputs, strict=True):
            start, end = sample.about[2]
            begin = sample.rows[0].begins[0]
            predicted.append(output[begin : begin + end - start].argmax(axis=-1))
        whole = assembled([sample.about[2] for sample in samples], predicted, count)
        return {"id": item.id, "tags": list(repaired(word_tags(first, whole, self.labels.names)))}

    def metrics(self, items: Many[Any], predictions: Many[dict[str, Any]]) -> dict[str, float]:
        gold, found = [item.tags for item in items], [line["tags"] for line in predictions]
        default, strict = (EntityCounts.of(gold, found, mode).micro for mode in (False, True))
        pairs = [(a, b) for one, other in zip(gold, found, strict=True) for a, b in zip(one, other, strict=True)]
        scores = {"f1": default.f1, "precision": default.precision, "recall": default.recall, "strict_f1": strict.f1}
        return {**scores, "accuracy": float(np.mean([a == b for a, b in pairs]))}

    def floor(self, training: Many[Any], items: Many[Any]) -> dict[str, float]:
        table = gazetteer((item.tokens, item.tags) for item in training)
        return self.metrics(items, [{"tags": list(gazetteer_tags(table, item.tokens))} for item in items])


class QuestionAnswering(Task):
    """Where the answer begins and ends in the passage, which is cut into windows; its [CLS] is "no answer" (Devlin et al.
    2018, section 4.3)."""

    metric = "f1"

    @property
    def num_outputs(self) -> int:
        return 2

    @classmethod
    def read(cls, config: ObjectiveConfig, path: Path, labelled: bool, findings: Findings) -> Iterator[Any]:
        return read_questions(path, config.version_2, labelled, keep_missing=True, findings=findings)

    def samples(self, number: int, item: Any, path: Path, findings: Findings) -> list[Sample]:
        question = self.form.tokenizer.encode(item.question)[: self.config.question_length]
        ids, offsets = self.form.tokenizer.encode_with_offsets(item.context)
        places = np.array(offsets, np.int64).reshape(-1, 2)
        place = f"{path}:{item.line}"
        room = passage_room(place, len(question), self.form.num_special(2), self.form.length, self.config.overlap)
        answer = next((found for found in item.answers if found.start >= 0), None)
        span = None
        if answer is not None:
            span = span_of_answer(places[:, 0], places[:, 1], answer.start, answer.start + len(answer.text))
        made = []
        for count, window in enumerate(windows(len(ids), room, self.config.overlap)):
            sequence = self.form.joined([question, ids[window[0] : window[1]]])
            inside = within(span, window)
            ends = np.array([0, 0] if inside is None else [sequence.begins[1] + place for place in inside])
            made.append(Sample(number, (sequence,), ends, (places, window), count))
        return made

    def prediction(self, item: Any, samples: Many[Sample], outputs: Many[Array]) -> dict[str, Any]:
        found = []
        for sample, output in zip(samples, outputs, strict=True):
            window, begin = sample.about[1], sample.rows[0].begins[1]
            scores = output[begin : begin + window[1] - window[0]]
            spans = best_spans(scores[:, 0], scores[:, 1], self.config.best, self.config.answer_length)
            found.append((window, spans, float(output[0].sum())))
        places = samples[0].about[0]
        best = merged(item.context, places[:, 0], places[:, 1], found, self.config.best)
        answer = best.answer(0.0 if self.config.version_2 else None)
        score = best.candidates[0].score if best.candidates else 0.0
        none = {"no_answer_score": best.no_answer} if self.config.version_2 and math.isfinite(best.no_answer) else {}
        nbest = [{"answer": candidate.text, "score": candidate.score} for candidate in best.candidates[:3]]
        return {"id": item.id, "answer": answer, "score": score, **none, "nbest": nbest}

    def metrics(self, items: Many[Any], predictions: Many[dict[str, Any]]) -> dict[str, float]:
        rows: list[Any] = []
        for item, line in zip(items, predictions, strict=True):
            gold = [answer.text for answer in item.answers]
            rows += scored(line["answer"], gold, self.config.version_2, line.get("no_answer_score", 0.0)).rows
        total = AnswerScores(tuple(rows))
        return {"f1": total.f1 / 100, "exact": total.exact / 100}

    def floor(self, training: Many[Any], items: Many[Any]) -> dict[str, float]:
        return self.metrics(items, [{"answer": overlap_answer(item.question, item.context)} for item in items])


def softmax(scores: Array) -> Array:
    """(C,) float64."""
    wide = np.exp(scores.astype(np.float64) - scores.max())
    return wide / wide.sum()  # type: ignore[no-any-return]
