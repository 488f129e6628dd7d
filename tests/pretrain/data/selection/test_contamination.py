from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.selection import contamination
from pretrain.data.selection.contamination import Runs, texts_of
from pretrain.errors import UserError
from tests.pretrain.data.selection.making import page, selection, words

QUESTION = " ".join(words(50, 20))


def of(path: Path, *others: Path, **options: Any) -> dict[str, Any]:
    return {"contamination": {"files": [str(path), *map(str, others)], **options}}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [{"id": "7", "question": QUESTION, "choices": [" ".join(words(51, 13)), "short"]}, "just a string"]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_a_run_of_thirteen_words_drops_a_document_and_twelve_do_not(questions: Path) -> None:
    chosen, found = selection(**of(questions)), QUESTION.split()
    texts = [f"{page(1)} {' '.join(found[4 : 4 + count])} {page(2)}" for count in (12, 13)]
    assert [verdict.reason for verdict in chosen.judge([*texts, page(3)])] == ["", "contamination", ""]
    assert chosen.judge(texts)[1].detail == f"13 words of {questions}: {' '.join(found[4:17])}"


def test_case_and_punctuation_do_not_matter(questions: Path) -> None:
    loud = '"' + "... ".join(QUESTION.upper().split()[:13]) + '!"'
    [verdict] = selection(**of(questions)).judge([f"{page(1)}\n{loud}\n{page(2)}"])
    assert verdict.detail.endswith(loud[1:-2])


def test_composed_and_decomposed_accents_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"caf\u00e9{number}" for number in "abcdefghijklm"))
    text = " ".join(f"cafe\u0301{number}" for number in "abcdefghijklm")
    assert selection(**of(path)).judge([text])[0].reason == "contamination"


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    content = {
        "a.txt": (f"Title\n{QUESTION}\n", [f"Title\n{QUESTION}\n"]),
        "a.tsv": (f'label\t{QUESTION}\nx\t"quote\n', ["label", QUESTION, "x", '"quote']),
        "a.csv": (f'label,"two\nlines, {QUESTION}"\n', ["label", f"two\nlines, {QUESTION}"]),
        "a.jsonl": (json.dumps({"a": [QUESTION, {"b": "c"}], "n": 3}) + "\n\n", ["c", QUESTION]),
    }
    for name, (text, expected) in content.items():
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert sorted(texts_of(path)) == sorted(expected)
            assert selection(**of(path)).judge([QUESTION])[0].reason == "contamination"


def test_the_first_file_that_has_the_run_is_named_and_short_texts_are_counted(questions: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.txt"
    second.write_text(f"{QUESTION} {page(60)}")
    runs = Runs(selection(**of(questions, second)).config.contamination)  # type: ignore[arg-type]
    found = [runs.find(QUESTION), runs.find(page(60))]
    assert [one.file for one in found if one] == [str(questions), str(second)]
    assert (runs.num_texts, runs.num_short) == (6, 3)


@pytest.mark.parametrize("place", [0, 900, 930, 940, 950, 960, 1000, 3000])
def test_a_long_document_is_looked_at_piece_by_piece(
    place: int, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contamination, "GROUP", 1000)
    chosen, filler = selection(**of(questions)), "x" + " y" * 2000
    assert chosen.judge([filler[:place] + " " + QUESTION + " " + filler[place:]])[0].reason == "contamination"
    assert chosen.judge([filler])[0].reason == ""


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"', "a.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.txt", b"\xff\xfe", "cannot be read as an evaluation file"),
        ("a.txt.gz", b"no gzip", "cannot be read as an evaluation file"),
        ("a.csv", b'"' + b"x" * 200_000 + b'"\n', "cannot be read as an evaluation file"),
        ("a.txt", b"only a few words", "none of their 1 texts has 13 words"),
        (None, b"", "cannot be read as an evaluation file"),
    ],
)
def test_files_that_will_not_do_are_told(tmp_path: Path, name: str | None, content: bytes, told: str) -> None:
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        selection(**of(path))
