"""Exact match and F1 of answers as SQuAD's official scripts compute them, v1.1 and v2.

The state keeps a row a question (the best threshold needs each), and sums round alike in any order, so that shards of
an evaluation may be added in any grouping.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Row:
    """One question: exact match and F1 of the raw prediction (0 to 1), whether it has a gold answer, whether one was
    predicted, and the score of there being none (larger: rather none)."""

    exact: float
    f1: float
    has_answer: bool
    predicted: bool
    no_answer: float


@dataclass(frozen=True, slots=True)
class Best:
    """The best mean, in percent, that a threshold on the no-answer score reaches: above it, no answer is given."""

    score: float
    threshold: float


@dataclass(frozen=True)
class AnswerScores:
    """Rows of questions. Sum states with +; AnswerScores() is the state before any."""

    rows: tuple[Row, ...] = ()

    def __add__(self, other: AnswerScores) -> AnswerScores:
        return AnswerScores(self.rows + other.rows)

    @property
    def exact(self) -> float:
        """Exact match in percent; NaN without questions."""
        return _percent([row.exact for row in self.rows])

    @property
    def f1(self) -> float:
        """Mean F1 in percent; NaN without questions."""
        return _percent([row.f1 for row in self.rows])

    def only(self, has_answer: bool) -> AnswerScores:
        """The questions with (HasAns) or without (NoAns) a gold answer."""
        return AnswerScores(tuple(row for row in self.rows if row.has_answer == has_answer))

    def at(self, threshold: float) -> AnswerScores:
        """The scores if no answer is given wherever the no-answer score is above the threshold."""
        return AnswerScores(tuple(_silenced(row) if row.no_answer > threshold else row for row in self.rows))

    def best_exact(self) -> Best:
        """The threshold that is best for exact match."""
        return _best([(row, row.exact) for row in self.rows])

    def best_f1(self) -> Best:
        """The threshold that is best for F1."""
        return _best([(row, row.f1) for row in self.rows])


def scored(prediction: str, gold: Sequence[str], version_2: bool = False, no_answer: float = 0.0) -> AnswerScores:
    """The state of one question. No gold answers: v2's question without answer; a prediction of "" says there is none.

    v2 leaves gold answers out of which nothing remains when normalised, and counts two empty ones as equal.
    """
    if version_2:
        gold = [answer for answer in gold if normalised(answer)]
    exact = max(float(normalised(prediction) == normalised(answer)) for answer in gold or [""])
    f1 = max(token_f1(prediction, answer, version_2) for answer in gold or [""])
    return AnswerScores((Row(exact, f1, bool(gold), bool(prediction), no_answer),))


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: what SQuAD compares."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION))
    return " ".join(text.split())


def token_f1(prediction: str, gold: str, version_2: bool = False) -> float:
    """F1 of the two bags of words."""
    found, expected = normalised(prediction).split(), normalised(gold).split()
    if version_2 and not (found and expected):
        return float(found == expected)
    common = (Counter(found) & Counter(expected)).total()
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _silenced(row: Row) -> Row:
    right = float(not row.has_answer)
    return Row(right, right, row.has_answer, False, row.no_answer)


def _percent(values: Sequence[float]) -> float:
    return 100.0 * math.fsum(values) / len(values) if values else math.nan


def _best(rows: Sequence[tuple[Row, float]]) -> Best:
    """The official search: start with no answers at all, then answer the questions in order of their no-answer score.

    Questions of equal score are taken together, since no threshold parts them; ties of the mean keep the fewest
    answers. The official script's first threshold is 0, which answers nothing only if all scores are above it.
    """
    if not rows:
        return Best(math.nan, math.nan)
    ordered = sorted(rows, key=lambda item: item[0].no_answer)
    lowest = ordered[0][0].no_answer
    now = sum(not row.has_answer for row, _ in rows) + Fraction(0)
    best, threshold = now, 0.0 if lowest > 0 else math.nextafter(lowest, -math.inf)
    for no_answer, group in groupby(ordered, key=lambda item: item[0].no_answer):
        now += sum(Fraction(score) if row.has_answer else -int(row.predicted) for row, score in group)
        if now > best:
            best, threshold = now, no_answer
    return Best(100.0 * float(best) / len(rows), threshold)
