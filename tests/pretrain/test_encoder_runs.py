"""BERT through the real commands: it trains, resumes bitwise, is scored alike by every command, and refuses what it is not."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain.loading import load_model
from tests.pretrain import running
from tests.pretrain.kills import Death, Spot, arm
from tests.pretrain.models.references import weights_of

BERT = (
    "model={kind: bert, num_layers: 2, hidden_size: 32, num_heads: 4, norm_position: post, dropout: 0.1}",
    "objective={kind: masked, pairs: next, masking: word}",
)
MEASURED = running.MEASURED


def train(folder: Path, shards: Path, *more: str, **options: Any) -> running.Ran:
    return running.train(folder, shards, *BERT, "monitor.validation_samples=null", *more, **options)


def lines(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in running.lines_of(run)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    ran = train(folder, tiny_data)
    assert ran.code == 0, ran.told
    assert "masked loss" in ran.out and "pairs accuracy" in ran.out
    return folder / "run"


def test_metrics_hold_each_term_and_its_accuracy(run: Path) -> None:
    steps = [line for line in lines(run) if "loss" in line]
    assert all(line["loss"] == pytest.approx(line["masked_loss"] + line["pairs_loss"]) for line in steps)
    judged = [line for line in lines(run) if "validation_loss" in line]
    for line in judged:
        parts = line["validation_masked_loss"] + line["validation_pairs_loss"]
        assert line["validation_loss"] == pytest.approx(parts)
        assert 0 <= line["validation_masked_accuracy"] <= 1 and 0 <= line["validation_pairs_accuracy"] <= 1
        assert "bits_per_byte" not in line
    assert judged[-1]["validation_loss"] < judged[0]["validation_loss"]


def test_killed_and_started_again_it_is_the_same_run(run: Path, tmp_path: Path, tiny_data: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    death = Death("killed", Spot("optimizer step", count=8), rank=0, number=signal.SIGKILL)
    running.train_killed(
        tmp_path, tiny_data, *BERT, "monitor.validation_samples=null", fault=partial(arm, tmp_path, death)
    )
    assert running.steps_of(tmp_path / "run")[-1] < 8
    assert train(tmp_path, tiny_data).code == 0
    assert lines(tmp_path / "run") == lines(run)
    ours, theirs = (running.tensors_of(folder, 12) for folder in (tmp_path / "run", run))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_evaluate_gives_what_validation_gave(run: Path, tiny_data: Path) -> None:
    """Of all held-out sequences; in evaluation the last one, which validation leaves out, is filled up."""
    ran = running.command("evaluate", run, "--data", tiny_data / "validation", "--batch-size", "7")
    assert ran.code == 0, ran.told
    found = json.loads(ran.out)
    assert found["step"] == 12 and found["loss"] == pytest.approx(found["masked_loss"] + found["pairs_loss"])
    last = [line for line in lines(run) if "validation_loss" in line][-1]
    assert found["masked_loss"] == pytest.approx(last["validation_masked_loss"], rel=0.01)
    assert found["masked_accuracy"] == pytest.approx(last["validation_masked_accuracy"], abs=0.02)
    other = json.loads(running.command("evaluate", run, "--data", tiny_data / "validation", "--batch-size", "64").out)
    assert other == pytest.approx(found, rel=1e-5), "the batch size changes nothing"


def test_inspect_tells_the_encoder(run: Path) -> None:
    ran = running.command("inspect", run)
    assert ran.code == 0 and "bert, " in ran.out
    held = sum(tensor.numel() for tensor in weights_of(load_model(run).model).values())
    assert f"{held:,} parameters" in ran.out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("objective={kind: causal}",), ("objective.kind: causal does not train a bert", "set model.kind: gpt")),
        (("model.kind=gpt", "objective.pairs=none"), ("objective.kind: masked does not train a gpt",)),
        (("objective.mask_rate=0",), ("objective.mask_rate",)),
        (("objective.mask_share=0.95",), ("objective.mask_share: 0.95 and random_share 0.1",)),
        (("objective.span_limit=3",), ("objective.span_limit: has no effect with masking: token",)),
        (("objective.attention_across_documents=false",), ("would keep the segments of a pair apart",)),
        (("monitor.sample_every=1 steps",), ("monitor.sample_every: a model of masked writes no text",)),
        (("data.seq_length=4",), ("data.seq_length: 4 leaves no room",)),
        (("model.vocab_size=100",), ("model.vocab_size: 100 rows are too few",)),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tiny_data: Path, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ran = train(tmp_path, tiny_data, "objective={kind: masked, pairs: next}", *overrides)
    assert ran.code == 2 and all(word in ran.err for word in words), ran.told
    assert not (tmp_path / "run").exists()


def test_an_encoder_writes_no_text_and_has_no_stride(run: Path, tiny_data: Path) -> None:
    ran = running.command("generate", run, "--prompt", "def")
    assert ran.code == 2 and "a bert sees both sides of a token, so it writes no text" in ran.err
    ran = running.command("evaluate", run, "--data", tiny_data / "validation", "--stride", "3")
    assert ran.code == 2 and "--stride 3: this objective's sequences do not overlap" in ran.err
