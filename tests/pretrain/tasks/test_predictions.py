"""Prediction files go on after a kill, are whole or absent, and are scored only if every gold id is there once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.errors import UserError
from pretrain.tasks.choices import Choice
from pretrain.tasks.labelled import Classified, Rated
from pretrain.tasks.pairs import Pair
from pretrain.tasks.predictions import PredictionWriter, by_label, read_predictions
from pretrain.tasks.questions import Answer, Question
from pretrain.tasks.scoring import SCORERS, score_answers, score_classes, score_tags
from pretrain.tasks.tagged import Sentence

ROWS = [{"id": n, "label": "gut — ü", "scores": by_label(["a", "b"], [0.25, 0.75])} for n in range(5)]
GOLD = [Classified(n, n + 2, ("x",), label) for n, label in enumerate("abab")]


def write_all(path: Path, depends_on: str = "model 1") -> int:
    """Write what is missing of ROWS. Returns how many were written."""
    with PredictionWriter(path, depends_on) as writer:
        before = writer.num_done
        for row in writer.remaining(iter(ROWS), lambda row: row["id"]):
            writer.write(row)
        return writer.num_done - before


def lines_of(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values))
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400))
def test_a_file_cut_anywhere_goes_on_to_the_same_bytes(tmp_path: Path, cut: int) -> None:
    path, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    assert write_all(path) == 5 and not partial.exists()
    whole = path.read_bytes()
    path.unlink()
    partial.write_bytes(whole[:cut])
    (tmp_path / "out.jsonl.partial.of").write_text("model 1")
    assert write_all(path) == 5 - whole[:cut].count(b"\n")
    assert path.read_bytes() == whole
    assert [value for _, value in read_predictions(path, "label")] == ROWS
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl"]


def test_an_exception_leaves_the_lines_so_far_and_no_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt), PredictionWriter(path, "model 1") as writer:
        writer.write(ROWS[0])
        raise KeyboardInterrupt
    assert not path.exists()
    assert write_all(path) == 4


def test_another_model_begins_anew_and_another_input_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for depends_on, first in (("model 1", 7), ("model 2", 0)):
        with pytest.raises(KeyboardInterrupt), PredictionWriter(path, depends_on) as writer:
            assert writer.num_done == 0
            writer.write({**ROWS[0], "id": first})
            raise KeyboardInterrupt
        if first:
            with pytest.raises(UserError, match="begun with another input; remove it"):
                write_all(path, depends_on)
    assert write_all(path, "model 2") == 4


def test_scores_that_are_not_finite_and_folders_that_are_not_there_are_told(tmp_path: Path) -> None:
    told = pytest.raises(UserError, match="prediction of 3 has scores that are not finite")
    with told, PredictionWriter(tmp_path / "out.jsonl", "") as writer:
        writer.write({"id": 3, "label": "x", "scores": {"x": float("nan")}})
    with pytest.raises(UserError, match="cannot be written"):
        PredictionWriter(tmp_path / "none" / "out.jsonl", "")


@pytest.mark.parametrize(
    ("ids", "line", "message"),
    [
        ([0, 1, 2], 3, "1 gold ids have no prediction, the first is '3'"),
        ([0, 1, 2, 3, 1], 5, "the id '1' is already that of line 2"),
        ([0, 1, 2, 3, 4], 5, "the id '4' is none of the gold file's 4"),
    ],
)
def test_every_gold_id_must_be_there_exactly_once(tmp_path: Path, ids: list[int], line: int, message: str) -> None:
    path = lines_of(tmp_path / "p.jsonl", [{"id": n, "label": "a"} for n in ids])
    with pytest.raises(UserError) as error:
        score_classes(path, GOLD)
    assert str(error.value).startswith(f"{path}:{line}: {message}")


def test_classes_are_scored_by_name_in_any_order(tmp_path: Path) -> None:
    path = lines_of(
        tmp_path / "p.jsonl", [{"id": n, "label": label} for n, label in ((3, "b"), (1, "a"), (0, "a"), (2, "a"))]
    )
    assert score_classes(path, GOLD) == pytest.approx(
        {"accuracy": 0.75, "macro_f1": (0.8 + 2 / 3) / 2, "matthews": 1 / 3**0.5, "f1": 2 / 3}
    )


@pytest.mark.parametrize(
    ("task", "gold", "prediction", "expected"),
    [
        ("multiple-choice", [Choice(0, 1, "", "q", ("x", "y"), 1)], {"label": 1}, {"accuracy": 1}),
        ("sequence-to-sequence", [Pair(0, 1, "a", "b c")], {"text": " b c"}, {"exact": 1}),
        ("tagging", [Sentence(0, 1, ("a", "b"), ("B-x", "O"))], {"tags": ["I-x", "O"]}, {"f1": 1, "strict_f1": 0}),
        (
            "question-answering",
            [Question("0", 1, "one two", "?", (Answer("two", 4),))],
            {"answer": "two"},
            {"exact": 100},
        ),
    ],
)
def test_each_task_is_scored(tmp_path: Path, task: str, gold: Any, prediction: Any, expected: dict[str, float]) -> None:
    found = SCORERS[task](lines_of(tmp_path / "p.jsonl", [{"id": 0, **prediction}]), gold)
    assert {name: found[name] for name in expected} == expected


def test_numbers_are_scored_by_correlation(tmp_path: Path) -> None:
    gold = [Rated(n, n, ("x",), float(n)) for n in range(3)]
    path = lines_of(tmp_path / "p.jsonl", [{"id": n, "label": value} for n, value in enumerate((1, 2.5, 9))])
    assert SCORERS["regression"](path, gold)["spearman"] == pytest.approx(1)


def test_tags_and_answers_must_fit_their_texts(tmp_path: Path) -> None:
    sentence, question = Sentence(0, 1, ("a", "b"), ("O", "O")), Question("q", 1, "one two", "?", (Answer("two", 4),))
    for tags, message in ((["O"], "1 tags for the 2 tokens of sentence 0"), (["O", "X"], "the tag 'X' is not BIO")):
        with pytest.raises(UserError, match=rf"p\.jsonl:1: {message}"):
            score_tags(lines_of(tmp_path / "p.jsonl", [{"id": 0, "tags": tags}]), [sentence])
    with pytest.raises(UserError, match=r"p\.jsonl:1: the answer to q is no part of its passage"):
        score_answers(lines_of(tmp_path / "p.jsonl", [{"id": "q", "answer": "Two"}]), [question])


def test_version_2_is_scored_with_its_best_threshold(tmp_path: Path) -> None:
    gold = [Question("a", 1, "one", "?", (Answer("one", 0),)), Question("b", 2, "one", "?", ())]
    values = [{"id": "a", "answer": "one", "no_answer_score": -1}, {"id": "b", "answer": "one", "no_answer_score": 2.5}]
    found = score_answers(lines_of(tmp_path / "p.jsonl", values), gold, version_2=True)
    assert (found["exact"], found["best_exact"], found["best_exact_threshold"]) == (50, 100, -1)
    assert (found["has_answer_f1"], found["no_answer_exact"]) == (100, 0)
