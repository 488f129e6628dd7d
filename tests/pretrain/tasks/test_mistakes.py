"""Every wrong file gives one message with file and line, and what to do; no bytes at all give a traceback."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.tasks import lines, tagged
from pretrain.tasks.choices import read_choices
from pretrain.tasks.conversations import read_conversations
from pretrain.tasks.labelled import read_classified, read_rated
from pretrain.tasks.labels import LabelSet, learned
from pretrain.tasks.labels import given as given_labels
from pretrain.tasks.pairs import read_aligned, read_pairs, read_sources
from pretrain.tasks.predictions import KINDS, read_predictions
from pretrain.tasks.questions import read_questions
from pretrain.tasks.tagged import read_tagged

Reader = Callable[[str | Path], Iterator[Any]]
CLASSES, NUMBERS, CHOICES, TAGS, PAIRS, TALKS = (
    *(read_classified, read_rated, read_choices, read_tagged, read_pairs, read_conversations),
)
SQUAD_1, SQUAD_2 = read_questions, partial(read_questions, version_2=True)
NAMED_PAIRS = partial(read_pairs, columns=("en", "de"))


def squad(*questions: dict[str, Any], context: object = "one two three one") -> bytes:
    """SQuAD's JSON, a question a line: the first is on line 2."""
    inner = ",\n".join(json.dumps(question) for question in questions)
    return f'{{"data": [{{"paragraphs": [{{"context": {json.dumps(context)}, "qas": [\n{inner}]}}]}}]}}'.encode()


def asked(name: object = "q1", text: object = "two", start: object = 4, **more: Any) -> dict[str, Any]:
    return {"id": name, "question": "which?", "answers": [{"text": text, "answer_start": start}], **more}


NONE = {"id": "q1", "question": "which?", "answers": [], "is_impossible": True}
LONG = b"x" * (lines.MAX_LINE_BYTES + 1)

MISTAKES: list[tuple[Reader, str, bytes, int, str]] = [
    # a table's file
    (CLASSES, "a.tsv", b"", 1, "the file is empty; give"),
    (CLASSES, "a.tsv", b"label\ttext\n", 1, "the header only; give"),
    (CLASSES, "a.csv", b"label,text\r\n\r\n\n", 1, "the header only; give"),
    (CLASSES, "a.jsonl", b"\n\n", 2, "blank lines only; give"),
    (CLASSES, "a.xlsx", b"PK", 1, "ending must tell the format; name it .tsv"),
    (CLASSES, "a.tsv", b"label\ttext\n1\tcaf\xe9\n", 2, "not UTF-8 (0xe9 at byte offset 16); save"),
    (CLASSES, "a.tsv", b"\xef\xbb\xbflabel\ttext\n1\tcaf\xe9\n", 2, "not UTF-8 (0xe9 at byte offset 19); save"),
    (CLASSES, "a.tsv", b"\xef\xbb\xbflabel\xe9\ttext\n", 1, "not UTF-8 (0xe9 at byte offset 8); save"),
    (CLASSES, "a.tsv", "label\ttext\n".encode("utf-16"), 1, "the mark of UTF-16); save"),
    (CLASSES, "a.tsv", b"label\ttext\n1\ta\0b\n", 2, "a zero byte (byte offset 14)"),
    (CLASSES, "a.tsv", b"label\ttext\n1\t" + LONG, 2, "a line longer than 16 MiB; break"),
    (CLASSES, "a.tsv", b"1\ta film\n0\tanother\n", 1, "there is no column 'label'"),  # no header
    (CLASSES, "a.tsv", b"label\tbody\tnote\tsource\n1\ta\tb\tc\n", 1, "which are the texts is not clear; name"),
    (CLASSES, "a.tsv", b"label\tlabel\n1\ta\n", 1, "name the columns, each once"),
    (CLASSES, "a.tsv", b"label\t\n1\ta\n", 1, "name the columns, each once"),
    (CLASSES, "a.tsv", b"label\ttext\n1\ta\n0\n", 3, "too few columns, 1 where there must be 2: label, text; mend"),
    (CLASSES, "a.tsv", b"label\ttext\n1\ta\tb\n", 2, "too many columns, 3 where there must be 2"),
    (CLASSES, "a.tsv", b"label\ttext\n1\ta\n\n0\tb\n", 3, "too few columns"),
    (CLASSES, "a.csv", b"label,text\n1,a\n0,b,c\n", 3, "too many columns"),
    (CLASSES, "a.csv", b'label,text\n1,"a\n0,b\n', 2, "not CSV"),
    (CLASSES, "a.csv", b'label,text\n1,a\n0,"b"c\n', 3, "not CSV"),
    (CLASSES, "a.csv", b"label,text\n1," + b"x" * 200_000 + b"\n", 2, "not CSV"),
    (CLASSES, "a.tsv", b"label\ttext\n \ta\n", 2, "the label is empty; fill"),
    (CLASSES, "a.tsv", b"label\ttext\n1\t \n", 2, "the column 'text' is empty; fill"),
    (CLASSES, "a.tsv", b"label\ttext\ttext2\n1\ta\t\n", 2, "the column 'text2' is empty; fill"),
    (CLASSES, "a.tsv", b"id\tlabel\ttext\nx\t1\ta\nx\t0\tb\n", 3, "the id 'x' is already that of line 2"),
    (CLASSES, "a.jsonl", b'{"label": 1, "text": "a"}\n{"label": 1, "text": }\n', 2, "not JSON: Expecting value"),
    (CLASSES, "a.jsonl", b"[1]\n", 1, "a JSON object is expected on each line, not a list"),
    (CLASSES, "a.jsonl", b"[" * 100_000, 1, "nested too deeply; flatten"),
    (CLASSES, "a.jsonl", b'{"label": ' + b"9" * 5000 + b"}", 1, "not JSON that can be read"),
    (CLASSES, "a.jsonl", b'{"label": NaN, "text": "a"}', 1, "NaN is no JSON number"),
    (CLASSES, "a.jsonl", b'{"label": 1.5, "text": "a"}', 1, "the label must be text or a whole number"),
    (CLASSES, "a.jsonl", b'{"label": true, "text": "a"}', 1, "not true or false; put it in quotes"),
    (CLASSES, "a.jsonl", b'{"label": null, "text": "a"}', 1, "not null; put"),
    (CLASSES, "a.jsonl", b'{"label": 1, "text": 5}', 1, "the column 'text' must be text, not a number"),
    (CLASSES, "a.jsonl", b'{"label": 1, "text": "\\ud800"}', 1, "half a surrogate pair"),
    (CLASSES, "a.jsonl", b'{"label": 1, "text": "a"}\n{"text": "b"}', 2, "there is no column 'label'"),
    (NUMBERS, "a.tsv", b"label\ttext\n1.5\ta\nhigh\tb\n", 3, "a finite number for regression, not 'high'"),
    (NUMBERS, "a.tsv", b"label\ttext\nnan\ta\n", 2, "a finite number"),
    (NUMBERS, "a.jsonl", b'{"label": 1e999, "text": "a"}', 1, "a finite number"),
    (NUMBERS, "a.jsonl", b'{"label": ' + b"9" * 4000 + b', "text": "a"}', 1, "a finite number"),
    (NUMBERS, "a.tsv", b"label\ttext\n\ta\n", 2, "the label is empty"),
    # multiple choice
    (CHOICES, "a.jsonl", b'{"choices": ["a", "b"], "answer": 0}', 1, "neither a context nor a question"),
    (CHOICES, "a.jsonl", b'{"question": "q", "answer": 0}', 1, 'there is no list "choices"'),
    (CHOICES, "a.jsonl", b'{"question": "q", "choices": ["a"], "answer": 0}', 1, "1 choices; give 2 to"),
    (CHOICES, "a.jsonl", b'{"question": "q", "choices": ["a", ""], "answer": 0}', 1, "choice 1 is empty"),
    (CHOICES, "a.jsonl", b'{"question": "q", "choices": ["a", "b"]}', 1, "the answer is null"),
    (CHOICES, "a.jsonl", b'{"question": "q", "choices": ["a", "b"], "answer": 2}', 1, "none of the 2 choices"),
    (CHOICES, "a.tsv", b"question\tchoice0\tchoice1\tanswer\nq\t1\t2\t1\n", 2, "may mean choice 0 or 1"),
    (CHOICES, "a.tsv", b"question\tchoice0\tchoice1\tanswer\nq\tx\t\t0\n", 2, "1 choices"),
    # tagging
    (TAGS, "a.conll", b"", 1, "the file is empty"),
    (TAGS, "a.conll", b"\n \n\t\n", 1, "no sentences"),
    (TAGS, "a.conll", b"-DOCSTART- O\n\n", 1, "no sentences"),
    (TAGS, "a.conll", b"token\ttag\nA\tO\n", 1, "is a header, remove it"),
    (TAGS, "a.conll", b"A\tO\nB\n", 2, "a token without tag: 'B'"),
    (TAGS, "a.conll", b"A\tO\nB\t\n", 2, "a token without tag"),
    (TAGS, "a.conll", b"A\tO\nB\tPER\n", 2, "the tag 'PER' of 'B' is not BIO; use O"),
    (TAGS, "a.conll", b"A\tO\nB\tB-\n", 2, "is not BIO"),
    (TAGS, "a.conll", b"A\tO\nB\tS-PER\n", 2, "BIOES or BILOU; convert"),
    (TAGS, "a.conll", b"A O\nNew York B-LOC\n", 2, "too many columns, 3 where line 1 has 2"),
    (TAGS, "a.conll", b"A NN O\nB O\n", 2, "too few columns, 2 where line 1 has 3"),
    (TAGS, "a.jsonl", b'{"tokens": ["a", "b"], "tags": ["O"]}', 1, "2 tokens and 1 tags; give one tag"),
    (TAGS, "a.jsonl", b'{"tokens": ["a"], "tags": "O"}', 1, '"tags" must be a list of texts, not text'),
    (TAGS, "a.jsonl", b'{"tokens": ["a", 1], "tags": ["O", "O"]}', 1, "not a list with a number in it"),
    (TAGS, "a.jsonl", b'{"tokens": [], "tags": []}', 1, "a sentence without tokens"),
    (TAGS, "a.jsonl", b'{"tokens": ["\\udc00"], "tags": ["O"]}', 1, "half a surrogate pair"),
    # pairs
    (PAIRS, "a.tsv", b"source\ttarget\na\tb\n", 1, "a header where none is expected; remove"),
    (PAIRS, "a.tsv", b"a\tb\nc\n", 2, "too few columns"),
    (PAIRS, "a.tsv", b"a\tb\nc\t\n", 2, "the pair has no target (an empty side)"),
    (PAIRS, "a.tsv", b"a\tb\n\tc\n", 2, "the pair has no source (an empty side)"),
    (PAIRS, "a.jsonl", b'{"source": "a"}', 1, "there is no column 'target'"),
    (NAMED_PAIRS, "a.tsv", b"a\tb\nc\td\n", 2, "there is no column 'en'"),  # the header is missing
    (read_sources, "a.txt", b"a\n\nb\n", 2, "the pair has no source"),
    # conversations
    (TALKS, "a.tsv", b"prompt\tresponse\na\tb\n", 1, "are read from JSON lines"),
    (TALKS, "a.jsonl", b'{"prompt": "a"}', 1, 'there is no "response"'),
    (TALKS, "a.jsonl", b'{"prompt": "a", "response": ""}', 1, "the response is empty"),
    (TALKS, "a.jsonl", b'{"messages": {}}', 1, '"messages" must be a list'),
    (TALKS, "a.jsonl", b'{"messages": [5]}', 1, "message 0 must be an object"),
    (TALKS, "a.jsonl", b'{"messages": [{"role": "bot", "content": "a"}]}', 1, "message 0 has the role 'bot'"),
    (TALKS, "a.jsonl", b'{"messages": [{"role": ["x"], "content": "a"}]}', 1, "message 0 has the role a list"),
    (TALKS, "a.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', 1, "and, last, the assistant's answer"),
    # questions
    (SQUAD_1, "a.json", b"", 1, "the file is empty"),
    (SQUAD_1, "a.json", b'{"data":\n [}', 2, "not JSON: Expecting value"),
    (SQUAD_1, "a.json", b'{"data":\n "\xff"}', 2, "not UTF-8 (0xff at byte offset 11)"),
    (SQUAD_1, "a.json", b"[]", 1, 'no list of objects "data" in a list'),
    (SQUAD_1, "a.json", b'{"data": []}', 1, "no questions in the file"),
    (SQUAD_1, "a.json", b'{"data": [{"paragraphs": [{"context": "a", "qas": [3]}]}]}', 1, 'no list of objects "qas"'),
    (SQUAD_1, "a.json", squad(asked(), context=4), 2, "context must be text, not a number"),
    (SQUAD_1, "a.json", squad(asked("q1"), asked("q1")), 3, "the id 'q1' is already that of line 2"),
    (SQUAD_1, "a.json", squad(asked(None)), 1, "a question's id must be text, not null"),
    (SQUAD_1, "a.json", squad(asked(), {**NONE, "id": "q2"}), 3, "as in SQuAD v2, but this is a v1.1 run; turn on"),
    (SQUAD_2, "a.json", squad(asked(is_impossible=True)), 2, "marked impossible but has answers"),
    (SQUAD_2, "a.json", squad(asked(is_impossible="no")), 2, "true or false"),
    (SQUAD_1, "a.json", squad(asked(text="")), 2, "an answer of q1 is empty"),
    (SQUAD_1, "a.json", squad(asked(start="4")), 2, 'a whole number "answer_start"'),
    (SQUAD_1, "a.json", squad({"id": "q1", "answers": []}), 2, "the question q1 must be text, not null"),
    (SQUAD_1, "a.json", squad(asked(), asked("q2", "four")), 1, "1 of 2 questions have answers that are not in"),
    (SQUAD_1, "a.jsonl", b'{"id": "q", "question": "?", "answers": []}', 1, "the context must be text, not null"),
    # predictions
    (partial(read_predictions, kind="label"), "a.jsonl", b'{"label": "x"}', 1, 'needs an "id"'),
    (partial(read_predictions, kind="label"), "a.jsonl", b'{"id": 0, "tags": []}', 1, "has nothing as"),
    (partial(read_predictions, kind="tags"), "a.jsonl", b'{"id": 0, "tags": [1]}', 1, 'has a list as "tags"'),
]


@pytest.mark.parametrize(
    ("reader", "name", "data", "line", "message"),
    [pytest.param(*case, id=f"{number}: {case[4][:40]}") for number, case in enumerate(MISTAKES)],
)
def test_a_wrong_file_is_told_with_its_line_and_the_mend(
    tmp_path: Path, reader: Reader, name: str, data: bytes, line: int, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        list(reader(path))
    told = str(error.value)
    assert told.startswith(f"{path}:{line}: ") and message in told and told.endswith("."), told
    assert len(told) < 500 + len(str(path)) and "\n" not in told
    assert ";" in told or "header" in told or "ending" in told, "the message says what to do"


def test_files_of_unequal_lengths_are_told_with_both_counts(tmp_path: Path) -> None:
    left, right = tmp_path / "a.en", tmp_path / "a.de"
    left.write_text("a\nb\nc\nd\n")
    right.write_text("A\nB\n")
    for source, target in ((left, right), (right, left)):
        with pytest.raises(UserError) as error:
            list(read_aligned(source, target))
        assert str(error.value).startswith(f"{left}:3: 4 lines, but {right} has 2;")
    right.write_text("A\n\nC\nD\n")
    with pytest.raises(UserError, match=r"a\.de:2: the pair has no target"):
        list(read_aligned(left, right))


def test_a_path_that_is_no_file_of_text_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tsv")
    for name in ("missing.tsv", "pipe.tsv", ".", "a\0b.tsv", "x" * 5000 + ".tsv"):
        with pytest.raises(UserError, match=r"no file|no regular file|cannot be read"):
            list(read_tagged(tmp_path / name))


def test_a_label_that_training_never_had_is_named_with_file_and_line() -> None:
    with pytest.raises(UserError) as error:
        LabelSet(("0", "1")).index("2", "dev.tsv", 7)
    assert str(error.value).startswith("dev.tsv:7: the label '2' is none of the training file's (0, 1);")


def test_a_training_file_of_one_class_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.tsv:1: every row has the label"):
        learned("train.tsv", ["1", "1"])


def test_a_given_class_that_training_lacks_is_a_warning_with_counts() -> None:
    labels, warnings = given_labels("train.tsv", ["bad", "fair", "good"], Counter(bad=3, good=1200))
    assert labels.names == ("bad", "fair", "good")
    assert warnings == ["train.tsv: no row has the label 'fair' (bad 3, fair 0, good 1,200)"]
    with pytest.raises(UserError, match="each once"):
        given_labels("train.tsv", ["bad", "bad"], Counter())


def test_an_endless_sentence_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tagged, "MAX_TOKENS", 10)
    path = tmp_path / "a.conll"
    path.write_text("a O\n" * 11)
    with pytest.raises(UserError, match=r":11: a sentence of over 10 tokens; end"):
        list(read_tagged(path))


def test_a_json_file_too_large_to_parse_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "a.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(UserError, match="larger than the 1 MiB that are parsed at once; use JSON lines"):
        list(read_questions(tmp_path / "a.json"))


READERS: list[tuple[str, Reader]] = [
    *((f"a{ending}", reader) for reader in (CLASSES, NUMBERS, CHOICES, PAIRS) for ending in (".tsv", ".csv", ".jsonl")),
    *((f"a{ending}", partial(read_pairs, labelled=False)) for ending in (".tsv", ".jsonl")),
    *((f"a{ending}", partial(read_tagged, tagged=tag)) for tag in (True, False) for ending in (".conll", ".jsonl")),
    *((f"a{ending}", SQUAD_2) for ending in (".json", ".jsonl")),
    *(("a.jsonl", partial(read_predictions, kind=kind)) for kind in KINDS),
    ("a.jsonl", TALKS),
]
KEYS = (
    st.sampled_from(["id", "label", "text", "tokens", "tags", "choices", "question", "answer", "context", "answers"])
    | st.sampled_from(["source", "target", "messages", "role", "content", "prompt", "response"])
    | st.sampled_from(["data", "paragraphs", "qas", "is_impossible", "answer_start"])
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["O", "B-X", "user"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=12,
)
WORDS = (
    st.sampled_from([b"label", b"text", b"source", b"target", b"O", b"B-X", b"I-X", b"1", b"{", b"}", b"[", b'"id":'])
    | st.sampled_from([b"\t", b"\n", b"\r\n", b"\r", b'"', b",", b" ", b"-DOCSTART-", b"\\ud800"])
    | st.sampled_from([b"\xe9", b"\xc3\xa9", b"\0", b"\xef\xbb\xbf"])
)
BYTES = (
    st.binary(max_size=60)
    | st.lists(WORDS, max_size=25).map(b"".join)
    | st.lists(VALUES, max_size=3).map(lambda values: "\n".join(map(json.dumps, values)).encode())
)


@pytest.mark.thorough
@settings(max_examples=400, deadline=None)
@given(BYTES)
def test_random_bytes_give_records_or_a_users_mistake(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, reader in READERS:
            path = Path(folder) / name
            path.write_bytes(data)
            try:
                records = list(reader(path))
            except UserError as error:
                assert str(error).startswith(f"{path}:")
            else:
                assert records, "a file without examples is a mistake"
