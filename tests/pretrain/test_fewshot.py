"""`evaluate --task` against a plain computation, token by token, of what its prompts are said to be."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import fewshot
from pretrain.__main__ import main
from pretrain.errors import UserError
from pretrain.fewshot import CUT, LEFT_OUT, NORMALIZATIONS, draw, encode_pair, open_task
from pretrain.generate import Sampling, generate
from pretrain.loading import Loaded, load_model
from pretrain.models.gpt import GPT
from pretrain.tasks.lines import Findings
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import train_tokenizer
from tests.pretrain.huggingface.models import BERT, GPT2, write_run
from tests.pretrain.tokenization.samples import TEXTS, WORDS

LENGTH = 256
QUESTIONS = [
    {
        "context": "" if n % 3 else f"The {WORDS[n]} fox has {n} birds.",
        "question": f"Which {WORDS[n * 5 % 17]} sings {n}?" if n % 4 else "",
        "choices": [f"{WORDS[(n * k + k) % 17]} {'over the ' * (k % 3)}{k}" for k in range(1, 3 + n % 3)],
        "answer": n % 2,
    }
    for n in range(10)
    if n % 3 == 0 or n % 4
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 330)


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that is sure of what it says."""
    folder = tmp_path_factory.mktemp("fewshot") / "run"
    write_run(folder, {**GPT2, "initial_scale": 0.5}, tokenizer, length=LENGTH)
    return folder


@pytest.fixture(scope="module")
def loaded(run: Path) -> Loaded:
    return load_model(run)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("questions") / "questions.jsonl", QUESTIONS)


def arguments(task: Path, **given: Any) -> Namespace:
    names = ("shots", "examples", "seed", "normalize")
    return Namespace(**{**dict.fromkeys(names), "task": str(task), "run_folder": "RUN", "batch_size": 4, **given})


def evaluated(capfd: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """The command in this process: one JSON line."""
    assert main(["evaluate", *map(str, words)]) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 1 and "Traceback" not in err
    found: dict[str, Any] = json.loads(out)
    return found


# -- a plain computation -----------------------------------------------------------------------------------------------


def plain_chance(loaded: Loaded, before: str, after: str) -> tuple[float, int]:
    """Log-probability and number of the tokens of `after` behind a document end and `before`, each by a pass of its own."""
    assert isinstance(loaded.model, GPT)
    first, ids = loaded.tokenizer.encode(before), loaded.tokenizer.encode(before + after)
    assert ids[: len(first)] == first and before + after == loaded.tokenizer.decode(ids)
    total = 0.0
    for place in range(len(first), len(ids)):
        logits = loaded.model.logits(torch.tensor([[loaded.tokenizer.eos, *ids[:place]]]))[0, -1]
        total += logits.double().log_softmax(-1)[ids[place]].item()
    return total, len(ids) - len(first)


def plain_prompt(question: dict[str, Any]) -> str:
    asked = f"Question: {question['question']}\nAnswer:" if question["question"] else ""
    return question["context"] + ("\n" if question["context"] and asked else "") + asked


def plain_scores(loaded: Loaded, number: int, examples: list[int]) -> dict[str, list[float]]:
    """Of each choice, by normalisation."""
    question, scores = QUESTIONS[number], {name: [] for name in NORMALIZATIONS}
    shots = "".join(
        f"{plain_prompt(QUESTIONS[n])} {QUESTIONS[n]['choices'][QUESTIONS[n]['answer']]}\n\n" for n in examples
    )
    for choice in question["choices"]:
        total, tokens = plain_chance(loaded, shots + plain_prompt(question), f" {choice}")
        alone, _ = plain_chance(loaded, "Answer:", f" {choice}")
        values = (total, total / tokens, total / len(choice.encode()), total - alone)
        for name, value in zip(NORMALIZATIONS, values, strict=True):
            scores[name].append(value)
    return scores


@pytest.mark.parametrize("shots", [0, 2])
def test_choices_are_scored_as_by_a_plain_computation(
    run: Path, loaded: Loaded, questions: Path, shots: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the command, by every normalisation."""
    extra = ("--shots", str(shots), "--seed", "5") if shots else ()
    result = evaluated(capfd, run, "--task", questions, *extra, "--normalize", "bytes", "--batch-size", "3")
    right: dict[str, list[bool]] = {name: [] for name in NORMALIZATIONS}
    totals = []
    for number, question in enumerate(QUESTIONS):
        scores = plain_scores(loaded, number, draw(number, len(QUESTIONS), shots, 5, own=True))
        for name, values in scores.items():
            right[name].append(values.index(max(values)) == question["answer"])
        totals.append(scores["none"][question["answer"]])
    expected = {f"accuracy_{name}": sum(values) / len(values) for name, values in right.items()}
    assert len({tuple(values) for values in right.values()}) > 2, "the normalisations differ"
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert result["accuracy"] == result["accuracy_bytes"] and result["normalize"] == "bytes"
    assert result["log_likelihood"] == pytest.approx(sum(totals) / len(totals), rel=1e-5)
    share = result["accuracy"]
    assert result["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / (len(QUESTIONS) - 1)))
    assert (result["examples"], result["shots"], result["step"]) == (len(QUESTIONS), shots, 7)
    assert (result["left_out_shots"], result["cut_prompts"]) == (0, 0)


def test_the_batch_size_changes_nothing(
    run: Path, questions: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor how many items are held at once."""
    results = []
    for size, pool in ((1, 256), (5, 3), (64, 256)):
        monkeypatch.setattr(fewshot, "POOL", pool)
        results.append(evaluated(capfd, run, "--task", questions, "--shots", "2", "--batch-size", str(size)))
    totals = [result.pop("log_likelihood") for result in results]
    assert results[0] == results[1] == results[2] and results[0]["seed"] == 1
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-6)


def test_a_cloze_is_right_if_greedy_search_writes_it(
    run: Path, loaded: Loaded, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Targets are what the model itself writes, where that is text, or a word that it does not write."""
    assert isinstance(loaded.model, GPT)
    tokenizer, rows, right, totals = loaded.tokenizer, [], [], []
    for n in range(160):
        source = f"the {WORDS[n % 17]} jumps\nover {n} {WORDS[n * 7 % 17]}s"
        before = tokenizer.encode(source)
        greedy = list(generate(loaded.model, [tokenizer.eos, *before], 2, Sampling(temperature=0), None))
        text = tokenizer.decode(greedy)
        space = "" if text[:1].isspace() else " "
        written = (
            bool(text.strip()) and "\ufffd" not in text and tokenizer.encode(source + space + text) == before + greedy
        )
        if written or n % 16 == 0:
            rows.append({"source": source, "target": text if written else "fox"})
            right.append(written)
            totals.append(plain_chance(loaded, source, space + text if written else " fox")[0])
    assert 3 < sum(right) < len(right) - 3, "of both kinds"
    result = evaluated(capfd, run, "--task", write_lines(tmp_path / "cloze.jsonl", rows))
    assert result["accuracy"] == sum(right) / len(right)
    assert result["log_likelihood"] == pytest.approx(sum(totals) / len(totals), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(-sum(totals) / len(totals)), rel=1e-5)
    assert "normalize" not in result


def test_the_floor_is_chance_or_the_commonest_answer(loaded: Loaded, tmp_path: Path) -> None:
    yes = [{"question": f"{n}?", "choices": ["yes", "no"], "answer": int(n > 2)} for n in range(10)]
    cloze = [{"source": f"{n}", "target": "b" if n % 3 else "a"} for n in range(6)]
    for rows, floor in ((yes, 0.7), (yes[:5] + yes[:3], 6 / 8), (QUESTIONS, None), (cloze, 4 / 6)):
        task = open_task(arguments(write_lines(tmp_path / "task.jsonl", rows)))
        chance = sum(1 / len(row["choices"]) for row in QUESTIONS) / len(QUESTIONS)
        assert fewshot.floor(task) == pytest.approx(chance if floor is None else floor)
    both = arguments(
        write_lines(tmp_path / "a.jsonl", yes[:4]), examples=write_lines(tmp_path / "b.jsonl", yes), shots=1
    )
    assert fewshot.floor(open_task(both)) == 0.5, "the examples' commonest is no, of which there is 1 of 4"


# -- examples ----------------------------------------------------------------------------------------------------------


def test_examples_are_drawn_by_seed_and_item() -> None:
    drawn = {(seed, number): draw(number, 12, 4, seed, own=True) for seed in (1, 2) for number in range(12)}
    for (seed, number), places in drawn.items():
        assert len(set(places)) == 4 and number not in places and set(places) < set(range(12))
        assert draw(number, 12, 7, seed, own=True)[:4] == places
    assert len({tuple(places) for places in drawn.values()}) > 20
    assert sorted(draw(3, 12, 11, 1, own=True)) == [n for n in range(12) if n != 3]
    assert sorted(draw(3, 12, 12, 1, own=False)) == list(range(12))
    counts = Counter(place for number in range(1000) for place in draw(number, 20, 2, 9, own=False))
    assert len(counts) == 20 and all(60 < count < 145 for count in counts.values()), counts


def test_examples_come_from_their_file(loaded: Loaded, questions: Path, tmp_path: Path) -> None:
    rows = [{"question": "q", "choices": ["one", "two"], "answer": 1}]
    examples = write_lines(tmp_path / "examples.jsonl", rows)
    task = open_task(arguments(questions, shots=1, examples=examples))
    assert not task.own and len(task.pool) == 1
    (request, *_), _ = fewshot.prepare(loaded.tokenizer, LENGTH, task, task.items[1], Findings())
    text = loaded.tokenizer.decode([*request.context, *request.continuation])
    assert text.startswith("Question: q\nAnswer: two\n\nQuestion: Which") and request.context[0] == loaded.tokenizer.eos
    same = open_task(
        arguments(questions, shots=1, examples=questions.parent / ".." / questions.parent.name / questions.name)
    )
    assert same.own and same.pool is same.items


def test_what_is_too_long_loses_whole_examples_and_is_counted(loaded: Loaded, tmp_path: Path) -> None:
    tokenizer = loaded.tokenizer
    rows = [{"source": f"{n} " + "quick brown fox " * 2, "target": f"jumps {n}"} for n in range(4)]
    task, findings = open_task(arguments(write_lines(tmp_path / "task.jsonl", rows), shots=3)), Findings()
    whole, none = fewshot.prepare(tokenizer, 1000, task, task.items[2], findings)
    assert none == 0 and findings.counts == {}
    shot = len(tokenizer.encode(f"{task.items[0].solved}\n\n"))
    length = len(whole[0].context) + len(whole[0].continuation) - 1
    for room, left_out in (
        (length, 0),
        (length - 1, 1),
        (length - shot, 1),
        (length - shot - 1, 2),
        (length - 3 * shot, 3),
    ):
        (request,), found = fewshot.prepare(tokenizer, room, task, task.items[2], findings)
        assert found == left_out
        text = tokenizer.decode([*request.context, *request.continuation])
        kept = draw(2, 4, 3, 1, own=True)[left_out:]
        assert text == "".join(f"{task.items[n].solved}\n\n" for n in kept) + task.items[2].solved
        assert request.context[0] == tokenizer.eos
    assert findings.counts == {LEFT_OUT: 4}
    (request,), found = fewshot.prepare(tokenizer, 9, task, task.items[2], findings)
    assert found == 3 and findings.counts == {LEFT_OUT: 5, CUT: 1}
    assert [*request.context, *request.continuation] == [*whole[0].context, *whole[0].continuation][-10:]


def test_the_command_counts_what_was_left_out(
    run: Path, questions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "context": "the lazy dog sings " * (40 if n == 2 else 4)} for n, row in enumerate(QUESTIONS)]
    path = write_lines(tmp_path / "long.jsonl", rows)
    assert main(["evaluate", str(run), "--task", str(path), "--shots", "3"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result["cut_prompts"] == 1 and 0 < result["left_out_shots"] < 3 * len(rows)
    assert f"1 x {CUT} (first at {path}:3)" in err and LEFT_OUT in err


# -- encoding ------------------------------------------------------------------------------------------------------------


def test_a_pair_is_one_text_cut_before_the_continuation(tokenizer: Tokenizer) -> None:
    text, merged = "Answer: the  quick_brown(7)\n\tif naïve 日本 'fox' jumps", 0
    ids, offsets = tokenizer.encode_with_offsets(text)
    for place in range(1, len(text)):
        before, after = encode_pair(tokenizer, text[:place], text[place:])
        assert before + after == ids and after
        end = len(text[:place].rstrip())
        assert all(last <= end for _, last in offsets[: len(before)]), "nothing of the continuation stands before it"
        assert offsets[len(before)][1] > end
        merged += offsets[len(before)][0] < end
    assert merged > 3, "pieces that hold the end of one and the beginning of the other"


# -- mistakes ------------------------------------------------------------------------------------------------------------


MISTAKES = [
    ("a.jsonl", "", 1, "the file is empty"),
    ("a.jsonl", '{"text": "a"}', 1, "neither multiple choice nor cloze; give"),
    ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": "a", "target": " "}', 2, "no target"),
    (
        "a.jsonl",
        '{"id": 1, "source": "a", "target": "b"}\n{"id": 1, "source": "c", "target": "d"}',
        2,
        "that of line 1",
    ),
    ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 2}', 1, "none of the 2 choices"),
    ("a.jsonl", '{"question": "q", "choices": ["a", ""], "answer": 0}', 1, "choice 1 is empty"),
    ("a.jsonl", '{"question": "q", "choices": [], "answer": 0}', 1, "0 choices"),
    ("a.jsonl", '{"id": 1, "question": "q", "choices": ["a", "b"], "answer": 0}\n' * 2, 2, "that of line 1"),
    ("a.tsv", "question\tchoice0\tchoice1\tanswer\nq\tx\ty\tC\n", 2, "none of the 2 choices"),
    ("a.tsv", "source alone\n", 1, "too few columns"),
    ("a.tsv", "", 1, "the file is empty"),
]


@pytest.mark.parametrize(("name", "content", "line", "words"), MISTAKES)
def test_a_mistake_in_the_file_is_told_with_its_line(
    tmp_path: Path, name: str, content: str, line: int, words: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        open_task(arguments(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path / name}:{line}: ") and words in str(error.value)


def test_tables_hold_the_same_tasks(questions: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a b\tc\nd \te\n")
    task = open_task(arguments(tmp_path / "a.tsv"))
    assert not task.is_choice and [item.solved for item in task.items] == ["a b c", "d e"]
    (tmp_path / "b.tsv").write_text("answer\tquestion\tchoice0\tchoice1\nB\tq\tx\ty\n")
    task = open_task(arguments(tmp_path / "b.tsv"))
    assert task.is_choice and [item.solved for item in task.items] == ["Question: q\nAnswer: y"]


def test_options_that_cannot_be_are_refused(loaded: Loaded, questions: Path, tmp_path: Path) -> None:
    cloze = write_lines(tmp_path / "cloze.jsonl", [{"source": "a", "target": "b"}])
    for wrong, words in (
        ({"shots": -1}, "--shots -1: give 0"),
        ({"shots": len(QUESTIONS)}, f"has {len(QUESTIONS) - 1} examples, without the item itself"),
        ({"shots": 2, "examples": cloze}, "not the same kind of task"),
        ({"examples": questions}, "--examples: no effect"),
        ({"seed": 3}, "--seed: no effect"),
    ):
        with pytest.raises(UserError, match=words):
            open_task(arguments(questions, **wrong))
    with pytest.raises(UserError, match=r"--normalize: no effect on .*cloze.jsonl"):
        fewshot.evaluate(loaded, arguments(cloze, normalize="tokens"))
    with pytest.raises(UserError, match=r"cloze.jsonl:1: an answer of more tokens than the 256"):
        fewshot.evaluate(loaded, arguments(write_lines(cloze, [{"source": "a", "target": "9 " * 200}])))


def test_the_command_refuses_encoders_and_options_of_the_other_kind(
    run: Path, questions: Path, tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "bert", BERT, tokenizer, name="bert masked")
    for words, told in (
        ((tmp_path / "bert", "--task", questions), "a model for bert; --task needs one that continues a prompt"),
        ((run, "--task", questions, "--stride", "3"), "--stride 3: has no effect on --task"),
        (
            (run, "--data", questions, "--shots", "3", "--normalize", "none"),
            "--shots, --normalize: no effect on --data",
        ),
        ((run, "--task", questions, "--batch-size", "0"), "--batch-size 0: give at least 1"),
    ):
        assert main(["evaluate", *map(str, words)]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("error: ") and told in err, err
    with pytest.raises(SystemExit) as error:
        main(["evaluate", str(run), "--task", str(questions), "--data", str(questions)])
    assert error.value.code == 2 and "not allowed with" in capfd.readouterr().err
