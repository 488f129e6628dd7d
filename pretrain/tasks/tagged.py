"""Tagging: sentences of tokens with BIO tags, from CoNLL files or JSON lines.

CoNLL: a token a line, its tag in the last column, columns between tabs (or spaces, where a line has no tab); a blank
line, one of white space alone too, ends a sentence, -DOCSTART- lines are left out. JSON lines: {"tokens", "tags"}.
Tags that BIO does not allow (I-X at the start, after O or after another type) begin an entity, as conlleval reads
them: they become B-X and are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.tasks.labels import OUTSIDE
from pretrain.tasks.lines import Findings, excerpt, fail, kind_of, read_lines
from pretrain.tasks.tables import is_json_lines, read_rows

MAX_TOKENS = 100_000  # of a sentence
DOCUMENT_START = "-DOCSTART-"
REPAIRED = "an I- tag that continues no entity, read as B-"
ODD_TOKEN = "an empty token or one with white space inside, kept"


@dataclass(frozen=True, slots=True)
class Sentence:
    """`id`: number of the sentence from 0; `line`: of its first token; tags None where none were asked for."""

    id: int
    line: int
    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class _Token:
    line: int
    text: str
    tag: str
    columns: int


def read_tagged(path: str | Path, tagged: bool = True, findings: Findings | None = None) -> Iterator[Sentence]:
    """Sentences of the file; what was repaired is counted in `findings`. Raises UserError with file and line."""
    findings = Findings() if findings is None else findings
    sentences = _json_sentences(path, tagged) if is_json_lines(path) else _conll_sentences(path, tagged)
    number = -1
    for number, tokens in enumerate(sentences):
        for token in tokens:
            if not token.text or re.search(r"\s", token.text):
                findings.add(path, token.line, ODD_TOKEN)
        tags = _checked_tags(path, tokens, findings) if tagged else None
        yield Sentence(number, tokens[0].line, tuple(token.text for token in tokens), tags)
    if number < 0:
        fail(path, 1, "no sentences: the file holds blank lines only; give a token and its tag a line")


def repaired(tags: Sequence[str]) -> tuple[str, ...]:
    """The tags with each I-X that continues no entity of type X as B-X: conlleval's reading, written in IOB2."""
    before = (OUTSIDE, *tags[:-1])
    return tuple(
        f"B-{tag[2:]}" if tag.startswith("I-") and previous[2:] != tag[2:] else tag
        for previous, tag in zip(before, tags, strict=False)
    )


def is_tag(tag: str) -> bool:
    """Whether it is O, B-type or I-type."""
    return tag == OUTSIDE or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def _checked_tags(path: str | Path, tokens: list[_Token], findings: Findings) -> tuple[str, ...]:
    for token in tokens:
        if not is_tag(token.tag):
            _fail_tag(path, token)
    tags = [token.tag for token in tokens]
    mended = repaired(tags)
    for token, tag in zip(tokens, mended, strict=True):
        if token.tag != tag:
            findings.add(path, token.line, REPAIRED)
    return mended


def _fail_tag(path: str | Path, token: _Token) -> None:
    what = f"the tag {excerpt(token.tag)} of {excerpt(token.text)} is not BIO"
    if token.tag[:2] in ("E-", "S-", "L-", "U-"):
        fail(path, token.line, f"{what} but BIOES or BILOU; convert S- and U- to B-, E- and L- to I-")
    if token.line == 1:
        fail(path, 1, f"{what}; if this line is a header, remove it: none is expected here")
    fail(path, token.line, f"{what}; use O, B-type and I-type")


def _conll_sentences(path: str | Path, tagged: bool) -> Iterator[list[_Token]]:
    sentence: list[_Token] = []
    first: _Token | None = None
    for line in read_lines(path):
        token = _token(path, line.number, line.text, tagged) if line.text.strip() else None
        if token is not None and token.text != DOCUMENT_START:
            first = first or token
            _check_columns(path, first, token, tagged)
            sentence.append(token)
            if len(sentence) > MAX_TOKENS:
                fail(path, token.line, f"a sentence of over {MAX_TOKENS:,} tokens; end sentences by a blank line")
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _token(path: str | Path, number: int, text: str, tagged: bool) -> _Token:
    cells = text.split("\t") if "\t" in text else re.split(" +", text.strip(" "))
    tag = cells[-1].strip() if len(cells) > 1 else ""
    if tagged and not tag:
        fail(path, number, f"a token without tag: {excerpt(text)}; each line needs a token and, last, its tag")
    return _Token(number, cells[0], tag, len(cells))


def _check_columns(path: str | Path, first: _Token, token: _Token, tagged: bool) -> None:
    if tagged and token.columns != first.columns:
        many = "many" if token.columns > first.columns else "few"
        what = f"too {many} columns, {token.columns} where line {first.line} has {first.columns}"
        fail(path, token.line, f"{what}; mend the line, and put tabs between columns if tokens hold spaces")


def _json_sentences(path: str | Path, tagged: bool) -> Iterator[list[_Token]]:
    for row in read_rows(path):
        tokens = _strings(path, row.line, "tokens", row.values.get("tokens"))
        tags = _strings(path, row.line, "tags", row.values.get("tags")) if tagged else [""] * len(tokens)
        if len(tokens) != len(tags):
            fail(path, row.line, f"{len(tokens)} tokens and {len(tags)} tags; give one tag for each token")
        if not tokens:
            fail(path, row.line, "a sentence without tokens; fill it or remove the line")
        yield [_Token(row.line, text, tag, 2) for text, tag in zip(tokens, tags, strict=True)]


def _strings(path: str | Path, line: int, name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        wrong = (
            next((kind_of(item) for item in value if not isinstance(item, str)), "") if isinstance(value, list) else ""
        )
        found = f"a list with {wrong} in it" if wrong else kind_of(value)
        fail(path, line, f'"{name}" must be a list of texts, not {found}; give {{"tokens": [...], "tags": [...]}}')
    for item in value:
        if any("\ud800" <= character <= "\udfff" for character in item):
            fail(
                path, line, f'"{name}" holds half a surrogate pair, which UTF-8 cannot write; write the whole character'
            )
    return value
