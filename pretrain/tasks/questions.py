"""Question answering: questions with their passage and the answers in it, from SQuAD's JSON, v1.1 and v2.

Also JSON lines for files that do not fit in memory: {"id", "context", "question", "answers": [{"text",
"answer_start"}], "is_impossible"} a line. An answer that is not at its offset is moved there if it occurs exactly once
in the passage; else it is dropped, and its question too if none is left, and counted: more than 5% of the questions
fail, since such a file was made by other rules. Offsets count characters (code points).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.tasks.lines import Findings, checked_text, fail, kind_of, parse_json, read_json_lines, read_text
from pretrain.tasks.tables import check_unique, is_json_lines

MAX_MISSING = 0.05
MOVED = "an answer that is not at its offset, moved to where it occurs"
MISSING = "an answer that is not in its passage at its offset, left out"
Raw = tuple[int, str, dict[str, Any]]  # line, passage, question


@dataclass(frozen=True, slots=True)
class Answer:
    """The passage's characters from `start`; start is -1 where evaluation keeps an answer that has no place."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """`id`: the file's own. No answers: there is none in the passage (v2), or none was asked for."""

    id: str
    line: int
    context: str
    question: str
    answers: tuple[Answer, ...]


def read_questions(
    path: str | Path,
    version_2: bool = False,
    labelled: bool = True,
    keep_missing: bool = False,
    findings: Findings | None = None,
) -> Iterator[Question]:
    """Questions of the file, in its order. version_2: some have no answer. keep_missing (for evaluation, whose test set
    must not shrink): answers without a place are kept, with start -1. Raises UserError with file and line."""
    findings = Findings() if findings is None else findings
    seen: dict[str, int] = {}
    total = lost = 0
    for line, context, raw in _json_lines(path) if is_json_lines(path) else _squad(path):
        name = _id(path, line, raw.get("id"))
        check_unique(path, line, name, seen)
        text = checked_text(path, line, f"the question {name}", raw.get("question"))
        answers = _answers(path, line, name, raw, version_2) if labelled else ()
        placed = _placed(path, line, context, answers, keep_missing, findings)
        total += 1
        if any(answer.start < 0 for answer in placed) or len(placed) < len(answers):
            lost += 1
        if placed or not answers:
            yield Question(name, line, context, text, placed)
    if lost > MAX_MISSING * total:
        what = f"{lost:,} of {total:,} questions have answers that are not in their passage at their offset"
        fail(path, 1, f"{what} ({100 * MAX_MISSING:.0f}% are borne); offsets must count characters: mend the file")
    if not total:
        fail(path, 1, "no questions in the file; give at least one")


def _id(path: str | Path, line: int, value: Any) -> str:
    if type(value) is int:
        return str(value)
    return checked_text(path, line, "a question's id", value)


def _answers(path: str | Path, line: int, name: str, raw: dict[str, Any], version_2: bool) -> tuple[Answer, ...]:
    found, impossible = raw.get("answers", []), raw.get("is_impossible", False)
    if not isinstance(found, list) or not isinstance(impossible, bool):
        fail(path, line, f'the question {name} needs a list "answers" and true or false as "is_impossible"; mend it')
    if impossible and found:
        fail(path, line, f"the question {name} is marked impossible but has answers; remove one or the other")
    if not found and not version_2:
        what = f"the question {name} has no answer, as in SQuAD v2, but this is a v1.1 run"
        fail(path, line, f"{what}; turn on version 2, or remove such questions")
    return tuple(_answer(path, line, name, answer) for answer in found)


def _answer(path: str | Path, line: int, name: str, value: Any) -> Answer:
    if not isinstance(value, dict) or type(value.get("answer_start")) is not int:
        fail(path, line, f'each answer of {name} must have "text" and a whole number "answer_start"; mend it')
    return Answer(checked_text(path, line, f"an answer of {name}", value.get("text")), value["answer_start"])


def _placed(
    path: str | Path, line: int, context: str, answers: tuple[Answer, ...], keep: bool, findings: Findings
) -> tuple[Answer, ...]:
    """The answers that are at their offset, those moved to it, and, if kept, those without one."""
    placed = []
    for answer in answers:
        if answer.start >= 0 and context.startswith(answer.text, answer.start):
            placed.append(answer)
            continue
        first = context.find(answer.text)
        if first >= 0 and context.find(answer.text, first + 1) < 0:
            findings.add(path, line, MOVED)
            placed.append(Answer(answer.text, first))
        else:
            findings.add(path, line, MISSING)
            placed += [Answer(answer.text, -1)] if keep else []
    return tuple(placed)


def _json_lines(path: str | Path) -> Iterator[Raw]:
    for line, value in read_json_lines(path):
        yield line, checked_text(path, line, "the context", value.get("context")), value


def _squad(path: str | Path) -> Iterator[Raw]:
    text = read_text(path)
    value = parse_json(path, 1, text)
    line_of = _finder(text)
    for article in _objects(path, 1, "data", value):
        for paragraph in _objects(path, 1, "paragraphs", article):
            questions = _objects(path, 1, "qas", paragraph)
            lines = [line_of(question.get("id")) for question in questions]
            context = checked_text(path, lines[0] if lines else 1, "a paragraph's context", paragraph.get("context"))
            yield from ((line, context, question) for line, question in zip(lines, questions, strict=True))


def _objects(path: str | Path, line: int, name: str, value: Any) -> list[dict[str, Any]]:
    """The list of objects under a key. Says SQuAD's shape where there is none."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        shape = '{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'
        what = f'no list of objects "{name}" in {kind_of(value)}'
        fail(path, line, f"{what}; SQuAD's JSON is {shape}")
    return found


def _finder(text: str) -> Callable[[Any], int]:
    """A function from ids, asked in the file's order, to the line where each stands (where JSON writes it plainly)."""
    position, line = 0, 1

    def line_of(name: Any) -> int:
        nonlocal position, line
        key = rf'"id"\s*:\s*{re.escape(json.dumps(name, ensure_ascii=False))}\s*[,}}]'
        if isinstance(name, str | int) and (found := re.compile(key).search(text, position)):
            line += text.count("\n", position, found.start())
            position = found.start() + 1
        return line

    return line_of
