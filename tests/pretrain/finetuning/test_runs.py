"""Fine-tuning through the real commands: each task learns, is scored alike by all, resumes bitwise, and is one under every
layout; and each mistake is told."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import comparison, runs, verify
from pretrain.config.run import Config
from pretrain.loading import load_model
from pretrain.tasks.lines import Findings
from pretrain.tasks.scoring import SCORERS
from tests.distributed import run_ranks
from tests.pretrain import running
from tests.pretrain.finetuning import tiny
from tests.pretrain.kills import Death, Spot, arm

KINDS = ("classification", "regression", "multiple-choice", "tagging", "question-answering")
METRIC = {"regression": "spearman", "tagging": "f1", "question-answering": "f1"}


def lines(run: Path) -> list[dict[str, Any]]:
    measured = (*running.MEASURED, "examples_per_second")
    return [{key: value for key, value in line.items() if key not in measured} for line in running.lines_of(run)]


class Tuned:
    """A finished run of each kind, made once."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards
        self.told: dict[str, str] = {}
        self.traces: dict[str, tuple[Config, list[comparison.Trace]]] = {}

    def config(self, kind: str) -> Path:
        path = self.folder / kind / "config.yaml"
        return path if path.is_file() else tiny.write_config(path.parent, kind, tiny.bert(self.shards))

    def run(self, kind: str) -> Path:
        if kind not in self.told:
            ran = running.command("train", self.config(kind), timeout=120)
            assert ran.code == 0, ran.told
            self.told[kind] = ran.out
        return self.folder / kind / "run"

    def alone(self, kind: str) -> tuple[Config, list[comparison.Trace]]:
        """The config that layouts are compared under, and one process's runs of it at two micro-batch sizes."""
        if kind not in self.traces:
            fields = [f"run.dir={self.folder / 'layouts'}", "optimizer.epsilon=1e-5", DECAY]
            config = runs.open_config(str(self.config(kind)), fields, 1)
            sizes = (config.batch.micro_size, 8)
            made = [run_ranks(1, verify.trace, verify._alone(verify.with_micro(config, size)), 4)[0] for size in sizes]
            self.traces[kind] = config, made
        return self.traces[kind]

    def dev(self, kind: str) -> Path:
        return next((self.folder / kind).glob("dev.*"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Tuned:
    return Tuned(tmp_path_factory.mktemp("tuned"), tiny_data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_learned_and_every_command_gives_the_same_score(kind: str, tuned: Tuned, tmp_path: Path) -> None:
    run = tuned.run(kind)
    judged = [line for line in lines(run) if "validation_loss" in line]
    name = METRIC.get(kind, "accuracy")
    assert len(judged) == 5 and judged[-1]["validation_loss"] < judged[0]["validation_loss"]
    assert judged[-1][f"validation_{name}"] > judged[0][f"validation_{name}"]
    assert "from " in tuned.told[kind] and "examples/s" in tuned.told[kind]
    assert "(without learning: " in tuned.told[kind] and "steps are few" in tuned.told[kind]
    for size in ("5", "64"):
        ran = running.command("evaluate", run, "--data", tuned.dev(kind), "--batch-size", size)
        assert ran.code == 0, ran.told
        found = json.loads(ran.out)
        assert found[name] == pytest.approx(judged[-1][f"validation_{name}"], abs=1e-9)
        assert found["examples"] == 21 and found["step"] == running.steps_of(run)[-1]
    out = tmp_path / "out.jsonl"
    ran = running.command("predict", run, "--input", tuned.dev(kind), "--out", out)
    assert ran.code == 0, ran.told
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == (
        [f"q{n}" for n in range(21)] if kind == "question-answering" else list(range(21))
    )
    task = task_of(run)
    gold = list(task.read(task.config, tuned.dev(kind), True, Findings()))
    scored = SCORERS[kind](out, gold)[{"question-answering": "f1"}.get(kind, name)]
    assert scored / (100 if kind == "question-answering" else 1) == pytest.approx(found[name], abs=1e-9)


def task_of(run: Path) -> Any:
    task = load_model(run).task
    assert task is not None
    return task


@pytest.mark.parametrize("kind", ["classification"])
def test_killed_and_started_again_it_is_the_same_run(kind: str, tuned: Tuned, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path, kind, tiny.bert(tuned.shards))
    whole, count = tuned.run(kind), running.steps_of(tuned.run(kind))[-1]
    death = Death("killed", Spot("optimizer step", count=count // 2 + 1), rank=0, number=signal.SIGKILL)
    running.killed("train", config, fault=partial(arm, tmp_path, death), timeout=120)
    assert running.command("train", tmp_path / "run", timeout=120).code == 0, "from its folder alone"
    assert lines(tmp_path / "run") == lines(whole)
    ours, theirs = (running.tensors_of(run, count) for run in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


DECAY = "optimizer.layer_decay=0.7"
LAYOUTS = ("tp=2,sp", "cp=2", "pp=2,zero=1", "dp=2,zero=2")


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_trains_the_same(kind: str, layout: str, tuned: Tuned) -> None:
    config, (one, other) = tuned.alone(kind)
    case = verify.case_of(config, layout)
    found = run_ranks(case.processes, verify.trace, case.config, 4)[0]
    compared = comparison.compare(layout, case.processes, one, found, comparison.spread(one, [other]))
    assert compared.same, f"step {compared.step}: {compared.what} {compared.parameters}"


def test_the_comparison_sees_a_head_whose_context_ranks_all_count(tuned: Tuned, tmp_path: Path) -> None:
    config = runs.open_config(str(tuned.config("tagging")), [f"run.dir={tmp_path / 'run'}"], 1)
    case = verify.case_of(config, "cp=2")
    one, found = run_ranks(1, verify.trace, verify._alone(config), 2)[0], run_ranks(2, faulty_trace, case.config)[0]
    assert not comparison.compare("cp=2", 2, one, found, comparison.Allowed()).same


def faulty_trace(config: Any) -> Any:
    """In a rank: every context rank counts the loss that all of them have."""
    from unittest import mock

    from pretrain.models.tasks import TaskModel

    original = TaskModel.forward

    def forward(model: Any, *batch: Any, **more: Any) -> Any:
        held = model.parts.context
        if model.training:
            model.parts.context = type(held)(held.size, 0, held.group)
        try:
            return original(model, *batch, **more)
        finally:
            model.parts.context = held

    with mock.patch.object(TaskModel, "forward", forward):
        return verify.trace(config, 2)


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2", ""])
def test_the_score_is_the_same_on_two_processes(layout: str, tuned: Tuned, tmp_path: Path) -> None:
    """Of 21 examples, which no two ranks share evenly."""
    wanted = next(line for line in lines(tuned.run("tagging")) if "validation_loss" in line)
    config = tiny.write_config(tmp_path, "tagging", tiny.bert(tuned.shards))
    ran = running.command(
        "train", config, "schedule.total=1 steps", "schedule.warmup=0 steps", *filter(None, [layout]), world=2
    )
    assert ran.code == 0, ran.told
    found = next(line for line in lines(tmp_path / "run") if "validation_loss" in line)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_decoder_is_tuned_too(tuned: Tuned, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path, "classification", tiny.gpt(tuned.shards))
    ran = running.command("train", config, timeout=120)
    assert ran.code == 0 and "gpt of " in ran.out, ran.told
    judged = [line for line in lines(tmp_path / "run") if "validation_loss" in line]
    assert judged[-1]["validation_loss"] < judged[0]["validation_loss"]


def test_weights_begin_as_the_initial_models_but_for_what_is_reset(tuned: Tuned, tmp_path: Path) -> None:
    initial = running.tensors_of(tiny.bert(tuned.shards), 4)
    base = {name.split(":")[1]: value for name, value in initial.items()}

    def begun(*overrides: str) -> dict[str, Any]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        config = tiny.write_config(folder, "classification", tiny.bert(tuned.shards))
        extra = ("schedule.total=1 steps", "schedule.warmup=0 steps", "optimizer.learning_rate=1e-30")
        assert running.command("train", config, *extra, "optimizer.weight_decay=0", *overrides).code == 0
        return {name.split(":")[1]: value for name, value in running.tensors_of(folder / "run", 1).items()}

    plain, top, everything = begun(), begun("model.reset=1"), begun("model.reset=all")
    body = [name for name in plain if name.startswith(("blocks", "embedding", "positions")) and "exp_avg" not in name]
    assert body and all(plain[name].equal(base[name]) for name in body if name in base)
    same = {name for name in body if name in base and top[name].equal(base[name])}
    assert all(name.startswith("blocks.1.") or name in same for name in body)
    assert not any(name in same for name in body if name.startswith("blocks.1.") and name.endswith("q.weight"))
    assert not everything["embedding.weight"].equal(base["embedding.weight"])


def test_lower_layers_learn_more_slowly_by_the_decay(tuned: Tuned, tmp_path: Path) -> None:
    """Adam's first step moves every element by the learning rate, whatever its gradient."""
    config = tiny.write_config(tmp_path, "classification", tiny.bert(tuned.shards))
    short = (
        "schedule.total=1 steps",
        "schedule.warmup=0 steps",
        "optimizer.weight_decay=0",
        "schedule.final_fraction=1.0",
    )
    ran = running.command("train", config, *short, DECAY, "optimizer.learning_rate=1e-3", "model.dropout=0")
    assert ran.code == 0, ran.told
    before = {name.split(":")[1]: value for name, value in running.tensors_of(tiny.bert(tuned.shards), 4).items()}
    after = {name.split(":")[1]: value for name, value in running.tensors_of(tmp_path / "run", 1).items()}

    def moved(name: str) -> float:
        return (after[name] - before[name]).abs().median().item()

    for name, rate in {
        "blocks.1.feed_forward.down.weight": 0.7,
        "blocks.0.feed_forward.down.weight": 0.7**2,
        "positions": 0.7**3,
    }.items():
        assert moved(name) == pytest.approx(1e-3 * rate, rel=0.02), name


def test_the_head_goes_on_for_the_same_labels_alone(tuned: Tuned, tmp_path: Path) -> None:
    """Of as many others, or in another order, it would answer with the wrong names."""
    initial = tuned.run("classification")
    head = running.tensors_of(initial, running.steps_of(initial)[-1])
    wanted = next(value for name, value in head.items() if name.endswith(":task_head.weight"))

    def head_of(name: str, *overrides: str, swap: bool = False) -> torch.Tensor:
        config = tiny.write_config(tmp_path / name, "classification", initial)
        if swap:
            for part in ("train", "dev"):
                path = tmp_path / name / f"{part}.tsv"
                path.write_text(path.read_text().replace("maybe\t", "perhaps\t"))
        still = (
            "schedule.total=1 steps",
            "schedule.warmup=0 steps",
            "optimizer.learning_rate=1e-30",
            "optimizer.weight_decay=0",
        )
        ran = running.command("train", config, *still, *overrides)
        assert ran.code == 0, ran.told
        made = running.tensors_of(tmp_path / name / "run", 1)
        return next(value for name, value in made.items() if name.endswith(":task_head.weight"))

    assert torch.equal(head_of("same"), wanted)
    assert not torch.equal(head_of("order", "objective.labels=[yes, no, maybe]"), wanted)
    assert not torch.equal(head_of("names", swap=True), wanted)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "overrides", "words"),
    [
        ("classification", ("model.num_layers=3",), ("model.num_layers: 3, but", "has 2", "remove it")),
        ("classification", ("model.initial=null",), ("model.initial: is missing",)),
        ("classification", ("model.initial=/nowhere",), ("/nowhere",)),
        ("classification", ("data.train=/nowhere.tsv",), ("data.train: there is no file /nowhere.tsv",)),
        ("classification", ("data.seq_length=64",), ("64 is longer than model.max_positions 32",)),
        ("classification", ("objective.class_weights=[1.0]",), ("give one above 0 for each of maybe, no, yes",)),
        ("classification", ("objective.labels=[no, yes]",), ("train.tsv:", "the label 'maybe'")),
        ("classification", ("objective.overlap=4",), ("objective.overlap", "has no effect with kind: classification")),
        ("classification", ("schedule.total=1M tokens",), ("schedule.total", "give steps or epochs")),
        ("tagging", ("objective.overlap=32",), ("objective.overlap: 32 is not below data.seq_length 32",)),
        ("question-answering", ("objective.question_length=30",), ()),
        ("multiple-choice", ("objective.texts=[a]",), ("objective.texts",)),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str, overrides: tuple[str, ...], words: tuple[str, ...], tuned: Tuned, tmp_path: Path
) -> None:
    config = tiny.write_config(tmp_path, kind, tiny.bert(tuned.shards))
    ran = running.command("train", config, *overrides, "schedule.total=1 steps" if not words else "run.seed=1")
    assert ran.code == (2 if words else 0), ran.told
    assert all(word in ran.err for word in words), ran.err
    assert "Traceback" not in ran.told


def test_a_label_that_training_never_had_is_named(tuned: Tuned, tmp_path: Path) -> None:
    run = tuned.run("classification")
    (tmp_path / "other.tsv").write_text("label\ttext\nyes\timport\nperhaps\tclass\n")
    ran = running.command("evaluate", run, "--data", tmp_path / "other.tsv")
    assert ran.code == 2 and "other.tsv:3: the label 'perhaps'" in ran.err


def test_predict_goes_on_where_it_was_stopped_and_writes_over_nothing(tuned: Tuned, tmp_path: Path) -> None:
    run, out = tuned.run("classification"), tmp_path / "out.jsonl"
    assert running.command("predict", run, "--input", tuned.dev("classification"), "--out", out).code == 0
    whole = out.read_bytes()
    ran = running.command("predict", run, "--input", tuned.dev("classification"), "--out", out)
    assert ran.code == 2 and "exists" in ran.err and out.read_bytes() == whole
    ran = running.command(
        "predict", tiny.bert(tuned.shards), "--input", tuned.dev("classification"), "--out", tmp_path / "x"
    )
    assert ran.code == 2 and "predicts no labels" in ran.err
