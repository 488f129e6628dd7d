"""C4's rules (Raffel et al. 2020, 2.2): pages that go, then lines that go, then pages of which too little is left.

What the paper says of pages is asked of the whole page; the published code asks it of the lines that it keeps. Sentences are
words that end in . ! or ? and what closes behind it, where the code asks a trained splitter. The paper's removal of spans of
three sentences that stand elsewhere is not here: `near` drops copies of documents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pretrain.data.selection.config import C4
from pretrain.data.selection.phrases import read_phrases
from pretrain.data.selection.rules import COUNTS, Array, Group, Measure, Rule, Scale, group_of
from pretrain.data.selection.words import Texts

CITATION = re.compile(r"\[(?:[0-9]*|edit|citation needed)\]")  # linear: what may repeat ends at the first other sign
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
ENDS = np.array([ord(sign) for sign in ".!?\u3002\uff01\uff1f"])
CLOSING = np.array([ord(sign) for sign in "\"')]\u201d\u2019\u300d"])
LEFT = Scale(1, 1000, log=True)


def groups(config: C4) -> tuple[Group, Group]:
    """Rules of the page as it is; then of the lines that are left of it."""
    pages: list[tuple[Rule, Measure]] = []
    if config.lorem_ipsum:
        pages.append((Rule("lorem ipsum", most=0, scale=None), _count("lorem ipsum")))
    if config.curly_brackets:
        pages.append((Rule("curly brackets", most=0, scale=None), _count("{")))
    if config.listed_words is not None:
        pages.append((Rule("listed words", most=0, scale=None), read_phrases(Path(config.listed_words)).counts))
    left: list[tuple[Rule, Measure]] = [
        (Rule("lines that are left", least=1, scale=COUNTS), _num_lines),
        (Rule("sentences that are left", config.min_sentences, scale=LEFT), num_sentences),
    ]
    return group_of(pages, "C4"), group_of(left, "C4", _line_filter(config))


def _count(phrase: str) -> Measure:
    def count(strings: Sequence[str], _: Texts) -> Array:
        return np.array([text.lower().count(phrase) for text in strings], np.int64)

    return count


def _num_lines(strings: Sequence[str], _: Texts) -> Array:
    return np.array([text.count("\n") + 1 if text else 0 for text in strings], np.int64)


def num_sentences(_: Sequence[str], texts: Texts) -> Array:
    """(D,) words that end a sentence."""
    words, points = texts.words, texts.points
    place, begin = words.ends - 1, words.starts
    for _turn in range(2):  # what closes: at most two signs, as in .")
        closes = np.isin(points[place], CLOSING) & (place > begin)
        place = place - closes
    return words.per_text(chosen=np.isin(points[place], ENDS))


def _line_filter(config: C4) -> Callable[[str], str]:
    """A text of only those lines that are kept."""
    ends = tuple(config.end_marks) if config.end_marks is not None else ("",)
    phrases = [*(["javascript"] if config.javascript else []), *(POLICIES if config.policies else ())]
    least, longest = config.min_line_words or 0, config.max_line_word

    def kept(line: str) -> bool:
        words = line.split()
        if not line or len(words) < least or not line.endswith(ends) or (ends != ("",) and line.endswith("...")):
            return False
        if longest is not None and len(line) > longest and max(map(len, words)) > longest:
            return False
        small = line.lower()
        return not any(phrase in small for phrase in phrases)

    def filtered(text: str) -> str:
        lines = (CITATION.sub("", line).strip() if config.citations else line.strip() for line in text.split("\n"))
        return "\n".join(line for line in lines if kept(line))

    return filtered
