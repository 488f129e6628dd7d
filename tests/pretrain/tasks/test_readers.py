"""Good files of every format give the records that they hold."""

from __future__ import annotations

import ast
import csv
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.tasks.choices import Choice, read_choices
from pretrain.tasks.conversations import Turn, read_conversations
from pretrain.tasks.labelled import Classified, Rated, read_classified, read_rated
from pretrain.tasks.labels import learned, tag_set
from pretrain.tasks.lines import Findings
from pretrain.tasks.pairs import Pair, read_aligned, read_pairs, read_sources
from pretrain.tasks.questions import MISSING, MOVED, Answer, read_questions
from pretrain.tasks.tagged import ODD_TOKEN, REPAIRED, Sentence, read_tagged, repaired
from tests.distributed import REPOSITORY
from tests.pretrain.tasks.test_mistakes import NONE, asked, squad

CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n\t"), min_size=1).filter(str.strip)
FOLDER = [HealthCheck.function_scoped_fixture]


def test_the_room_imports_numpy_and_the_standard_library_alone() -> None:
    allowed = {*sys.stdlib_module_names, "numpy"}
    found = []
    for path in (REPOSITORY / "pretrain" / "tasks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += names + ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
    ours = [name for name in found if name.startswith("pretrain")]
    assert len(ours) > 20 and all(name == "pretrain.errors" or name.startswith("pretrain.tasks.") for name in ours)
    assert {name.split(".")[0] for name in found} - allowed == {"pretrain"}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [True, False], ids=["ended", "unended"])
def test_marks_and_line_ends_change_nothing(tmp_path: Path, mark: bytes, end: bytes, last: bool) -> None:
    tsv = b'label\ttext\n1\ta \xc2\x85\xe2\x80\xa8"b\n0\tc\n'
    data = mark + tsv.replace(b"\n", end)
    (tmp_path / "a.tsv").write_bytes(data if last else data.removesuffix(end))
    assert list(read_classified(tmp_path / "a.tsv")) == [
        Classified(0, 2, ('a \x85\u2028"b',), "1"),
        Classified(1, 3, ("c",), "0"),
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=FOLDER)
@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=5))
def test_the_three_formats_hold_the_same_rows(tmp_path: Path, rows: list[tuple[str, str, str]]) -> None:
    names = ("label", "first", "second")
    out = io.StringIO()
    csv.writer(out).writerows([names, *rows])
    (tmp_path / "a.csv").write_text(out.getvalue(), newline="")
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row) for row in (names, *rows)), newline="")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    found = [
        [(r.id, r.texts, r.label) for r in read_classified(tmp_path / f"a{e}")] for e in (".csv", ".tsv", ".jsonl")
    ]
    assert found[0] == [(n, row[1:], row[0].strip()) for n, row in enumerate(rows)]
    assert found[1] == found[0] == found[2]


def test_a_csv_cell_may_hold_quotes_commas_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'label,text\r\n1,"a, ""b""\r\nc"\r\n0,d\r\n')
    assert [(r.line, r.texts) for r in read_classified(tmp_path / "a.csv")] == [(2, ('a, "b"\nc',)), (4, ("d",))]


def test_columns_may_be_named_and_labels_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("id\tbody\tscore\tnote\tmore\n7\ta\t1.5\tn\tm\n")
    assert list(read_rated(path, ["body"], "score")) == [Rated(0, 2, ("a",), 1.5)]
    assert list(read_rated(path, ["body", "note"], labelled=False)) == [Rated(0, 2, ("a", "n"), None)]
    path.write_text("text\nonly\n")
    assert list(read_classified(path, labelled=False)) == [Classified(0, 2, ("only",), None)]


def test_labels_are_learned_in_sorted_order_numbers_as_numbers() -> None:
    assert learned("f", ["10", "9", "-1", "9"]).names == ("-1", "9", "10")
    assert learned("f", ["b", "10", "9"]).names == ("10", "9", "b")
    assert tag_set(["O", "B-x", "I-y"]).names == ("B-x", "B-y", "I-x", "I-y", "O")


def test_choices_are_read_from_json_lines_and_tables(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"context": "c", "choices": ["x", "y"], "answer": 1}\n{"question": "q", "choices": ["x", "y"], "answer": "x"}'
    )
    (tmp_path / "a.tsv").write_text("question\tchoice0\tchoice1\tchoice2\tanswer\nq\tx\ty\tz\tC\nq\tx\ty\t\t0\n")
    assert list(read_choices(tmp_path / "a.jsonl")) == [
        Choice(0, 1, "c", "", ("x", "y"), 1),
        Choice(1, 2, "", "q", ("x", "y"), 0),
    ]
    assert [(c.choices, c.answer) for c in read_choices(tmp_path / "a.tsv")] == [(("x", "y", "z"), 2), (("x", "y"), 0)]
    assert [c.answer for c in read_choices(tmp_path / "a.tsv", labelled=False)] == [None, None]


def test_sentences_end_at_lines_of_white_space_and_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nx . O O\n \n\t\n\ny . O I-ORG\n")
    findings = Findings()
    found = list(read_tagged(tmp_path / "a.conll", findings=findings))
    assert found == [Sentence(0, 3, ("EU", "x"), ("B-ORG", "O")), Sentence(1, 8, ("y",), ("B-ORG",))]
    assert findings.counts == {REPAIRED: 1} and findings.places[REPAIRED] == [f"{tmp_path / 'a.conll'}:8"]
    assert findings.sentences() == [f"1 x {REPAIRED} (first at {tmp_path / 'a.conll'}:8)"]
    with pytest.raises(UserError, match=":8: an I- tag that continues no entity"):
        list(read_tagged(tmp_path / "a.conll", findings=Findings(strict=True)))


def test_odd_tokens_keep_the_count_and_json_lines_hold_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("New York\tB-L\n\tO\nx\tO\n")
    (tmp_path / "a.jsonl").write_text('{"tokens": ["New York", "", "x"], "tags": ["B-L", "O", "O"]}\n')
    for name in ("a.conll", "a.jsonl"):
        findings = Findings()
        assert list(read_tagged(tmp_path / name, findings=findings)) == [
            Sentence(0, 1, ("New York", "", "x"), ("B-L", "O", "O"))
        ]
        assert findings.counts == {ODD_TOKEN: 2}
    (tmp_path / "b.conll").write_text("New\nYork\n\nx\n")
    assert [s.tokens for s in read_tagged(tmp_path / "b.conll", tagged=False)] == [("New", "York"), ("x",)]


@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"])))
def test_repaired_tags_are_legal_and_legal_ones_stay(tags: list[str]) -> None:
    mended = repaired(tags)
    assert repaired(mended) == mended and len(mended) == len(tags)
    for before, tag in zip(("O", *mended), mended, strict=False):
        assert not tag.startswith("I-") or before[2:] == tag[2:]
    assert [tag[2:] for tag in mended] == [tag[2:] for tag in tags]


def test_answers_are_moved_only_where_there_is_one_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    good = [asked(f"g{n}") for n in range(40)]
    path.write_bytes(squad(*good, asked("moved", "three", 1), asked("lost", "one", 2), asked("gone", "four", 0)))
    findings = Findings()
    found = {question.id: question for question in read_questions(path, findings=findings)}
    assert found["moved"].answers == (Answer("three", 8),) and found["moved"].line == 42
    assert not {"lost", "gone"} & found.keys() and len(found) == 41
    assert findings.counts == {MOVED: 1, MISSING: 2} and findings.places[MISSING] == [f"{path}:43", f"{path}:44"]
    kept = {question.id: question for question in read_questions(path, keep_missing=True)}
    assert kept["lost"].answers == (Answer("one", -1),) and len(kept) == 43
    with pytest.raises(UserError, match=":42: an answer that is not at its offset"):
        list(read_questions(path, findings=Findings(strict=True)))


def test_questions_without_answer_belong_to_version_2(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(squad(NONE, asked("q2")))
    assert [len(q.answers) for q in read_questions(path, version_2=True)] == [0, 1]
    assert [q.answers for q in read_questions(path, labelled=False)] == [(), ()]
    flat = [{**question, "context": "one two three one"} for question in (NONE, asked(2))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, flat)))
    assert [(q.id, q.line) for q in read_questions(tmp_path / "a.jsonl", version_2=True)] == [("q1", 1), ("2", 2)]


def test_pairs_are_read_from_tables_lines_and_two_files(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('a "b\tA\nc\tC\n')
    (tmp_path / "a.jsonl").write_text('{"source": "a \\"b", "target": "A"}\n{"source": "c", "target": "C"}')
    (tmp_path / "n.csv").write_text('en,de\n"a ""b",A\nc,C\n')
    (tmp_path / "a.en").write_text('a "b\nc\n')
    (tmp_path / "a.de").write_text("A\nC")
    pairs = [Pair(0, 1, 'a "b', "A"), Pair(1, 2, "c", "C")]
    assert list(read_pairs(tmp_path / "a.tsv")) == list(read_pairs(tmp_path / "a.jsonl")) == pairs
    assert list(read_aligned(tmp_path / "a.en", tmp_path / "a.de")) == pairs
    assert [(p.source, p.target) for p in read_pairs(tmp_path / "n.csv", ("en", "de"))] == [('a "b', "A"), ("c", "C")]
    for path in (tmp_path / "a.tsv", tmp_path / "a.jsonl"):
        assert [(p.source, p.target) for p in read_pairs(path, labelled=False)] == [('a "b', None), ("c", None)]
    assert [p.source for p in read_sources(tmp_path / "a.en")] == ['a "b', "c"]


def test_conversations_are_messages_or_prompts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"prompt": "p", "response": "r"}))
    first, second = read_conversations(path)
    assert first.turns == (Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"))
    assert second.turns == (Turn("user", "p"), Turn("assistant", "r")) and (second.id, second.line) == (1, 2)
    assert [c.turns[-1].role for c in read_conversations(path, labelled=False)] == ["user", "user"]


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"label\ttext\n" + b"1\tx\n" * 50_000 + b"broken\n")
    rows = read_classified(path)
    assert next(rows).line == 2
    with pytest.raises(UserError, match=":50002: too few columns"):
        list(rows)
