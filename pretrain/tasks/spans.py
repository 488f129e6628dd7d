"""Answers as spans of word pieces: from characters to pieces and back, and the best spans of a model's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.tasks.alignment import Window

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """A span of the passage's pieces, both ends inclusive, and its score (sum of start's and end's)."""

    score: float
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer: its text, characters of the passage, and score."""

    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best answers, best first, and the score of there being none minus the best's (larger: rather none)."""

    candidates: tuple[Candidate, ...]
    no_answer: float

    def answer(self, threshold: float | None = None) -> str:
        """The best answer's text; "" where there is none or the no-answer score is above the threshold (v2)."""
        if not self.candidates or (threshold is not None and self.no_answer > threshold):
            return ""
        return self.candidates[0].text


def span_of_answer(starts: Array, ends: Array, start: int, end: int) -> tuple[int, int] | None:
    """First and last piece that share a character with the answer's [start, end); None if no piece does.

    starts, ends: (P,) characters of the passage that each piece covers.
    """
    inside = np.flatnonzero((starts < end) & (ends > start) & (ends > starts))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def within(span: tuple[int, int] | None, window: Window) -> tuple[int, int] | None:
    """The span's places in the window, if it is whole there; else None: the window's target is no answer."""
    if span is None or span[0] < window[0] or span[1] >= window[1]:
        return None
    return span[0] - window[0], span[1] - window[0]


def text_of_span(context: str, starts: Array, ends: Array, first: int, last: int) -> tuple[int, int]:
    """[start, end) characters of the pieces first to last, white space at both ends left out."""
    start, end = int(starts[first]), int(ends[last])
    text = context[start:end]
    return start + len(text) - len(text.lstrip()), max(start, end - len(text) + len(text.rstrip()))


def best_spans(start_scores: Array, end_scores: Array, num: int, max_length: int) -> list[Span]:
    """The `num` best spans of at most `max_length` pieces by start plus end score, of equal ones the earlier, shorter.

    start_scores, end_scores: (P,); -inf where no answer may begin or end. Raises ValueError for NaN.
    """
    begins, finishes = np.asarray(start_scores, np.float64), np.asarray(end_scores, np.float64)
    if np.isnan(begins).any() or np.isnan(finishes).any():
        raise ValueError("scores that are not numbers")
    size, width = len(begins), min(max_length, len(begins))
    if not width:
        return []
    last = np.arange(size)[:, None] + np.arange(width)  # (P, width): the pieces where a span may end
    scores = np.where(last < size, begins[:, None] + finishes[np.minimum(last, size - 1)], -np.inf).ravel()
    order = np.argsort(-scores, kind="stable")[:num]
    chosen = order[scores[order] > -np.inf]
    return [Span(float(scores[place]), int(place // width), int(place // width + place % width)) for place in chosen]


def merged(
    context: str,
    starts: Array,
    ends: Array,
    found: Sequence[tuple[Window, Sequence[Span], float]],
    num: int,
) -> Prediction:
    """The `num` best answers over all windows, and the no-answer score as BERT has it: the windows' least.

    found: of each window its pieces, its best spans (places in the window) and its score of no answer. The same
    characters from two windows count once, with their best score.
    """
    best: dict[tuple[int, int], float] = {}
    for (offset, _), spans, _ in found:
        for span in spans:
            place = text_of_span(context, starts, ends, span.first + offset, span.last + offset)
            if place[0] < place[1]:
                best[place] = max(span.score, best.get(place, -np.inf))
    ordered = sorted(best, key=lambda place: (-best[place], place))[:num]
    candidates = tuple(Candidate(best[place], *place, context[slice(*place)]) for place in ordered)
    none = min((score for _, _, score in found), default=0.0)
    return Prediction(candidates, none - candidates[0].score if candidates else float("inf"))
