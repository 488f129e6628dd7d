"""What is reached without learning: the figure beside every score, so that one sees what training added."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from pretrain.tasks.answers import normalised
from pretrain.tasks.labels import OUTSIDE
from pretrain.tasks.tagged import repaired

QUESTION_WORDS = frozenset(
    re.findall(r"\w+", "what who whom whose which when where why how is are was were do does did")
    + re.findall(r"\w+", "of in on at to for by with from and or")
)


def commonest(labels: Iterable[str]) -> str:
    """The commonest label of the training file; of equally common ones the first in sorted order."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def gazetteer(sentences: Iterable[tuple[Sequence[str], Sequence[str]]]) -> dict[str, str]:
    """Each token's commonest tag in training, from sentences of (tokens, tags)."""
    counts: dict[str, Counter[str]] = {}
    for tokens, tags in sentences:
        for token, tag in zip(tokens, tags, strict=True):
            counts.setdefault(token, Counter())[tag] += 1
    return {token: commonest(tags.elements()) for token, tags in counts.items()}


def gazetteer_tags(table: dict[str, str], tokens: Sequence[str]) -> tuple[str, ...]:
    """The tokens' commonest tags, O for unknown ones, made legal BIO."""
    return repaired([table.get(token, OUTSIDE) for token in tokens])


def overlap_answer(question: str, context: str) -> str:
    """The longest run of words that are not the question's, in the sentence that shares the most words with it."""
    asked = set(normalised(question).split()) - QUESTION_WORDS
    sentences = re.split(r"(?<=[.!?])\s+", context.strip())
    best = max(sentences, key=lambda sentence: len(asked & set(normalised(sentence).split())))
    return _longest_run(best, asked)


def _longest_run(sentence: str, asked: set[str]) -> str:
    """The longest piece of the sentence between words of the question, common words and commas cut from its ends."""
    runs: list[tuple[int, int, int]] = []  # -words, start, end
    start = end = words = 0
    for word in [*re.finditer(r"\S+", sentence), None]:
        name = normalised(word.group()) if word else ""
        stops = word is None or name in asked or name in QUESTION_WORDS
        if word is not None and not stops and (name or words):  # an article or a dash begins no run
            start, end, words = (start if words else word.start()), word.end(), words + 1
        if words and (stops or word is None or word.group()[-1] in ",;:"):
            runs.append((-words, start, end))
            words = 0
    _, start, end = min(runs, default=(0, 0, len(sentence)))
    return sentence[start:end].strip(" .,;:!?\"'()")
