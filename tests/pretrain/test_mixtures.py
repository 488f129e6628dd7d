"""Runs on named sources: one run whatever kills it at a change of weights, what it tells of each source, and what it refuses."""

from __future__ import annotations

import functools
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config.load import load_config
from pretrain.data.sources import Sources
from pretrain.data.stream import batch_hash
from tests.pretrain import running
from tests.pretrain.running import assert_refused, assert_same_run
from tests.pretrain.test_spikes import REWIND, spoil
from tests.training import write_config

LANES = ("data.lanes=8", "checkpoint.every=2 steps", "monitor.validation_samples=12")
BORDER = 6  # SHORT's batches grow up to it


def named(shards: Path, **code: Any) -> str:
    """web and code, of which both have held-out text."""
    web = {"folder": f"{shards}/train", "weight": 3, "validation": f"{shards}/validation"}
    code = {"folder": f"{shards}/validation", "weight": 1, "validation": f"{shards}/train", **code}
    return f"data.train={json.dumps({'web': web, 'code': code})}"


def mixture(shards: Path, **code: Any) -> tuple[str, ...]:
    curriculum = f"data.curriculum=[{{from: {BORDER} steps, weights: {{web: 1, code: 4}}}}]"
    return (named(shards, **code), curriculum, "data.validation=null", "monitor.tensorboard=true", *LANES)


@functools.cache
def uninterrupted(shards: Path) -> tuple[Path, str]:
    """A run to compare with, and what it told."""
    folder = shards.parent / "mixtures"
    ran = running.train(folder, shards, *mixture(shards), "checkpoint.keep_last=9")
    assert ran.code == 0, ran.told
    return folder / "run", ran.out


def test_killed_before_at_and_behind_a_change_of_weights_it_is_the_same_run(tmp_path: Path, tiny_data: Path) -> None:
    whole, run = uninterrupted(tiny_data)[0], tmp_path / "run"
    for kept, count in ((4, 5), (6, 3), (8, 3)):  # the last checkpoint, and in which of its own steps a session dies
        fault = partial(running.kill_in_step, count)
        running.train_killed(tmp_path, tiny_data, *mixture(tiny_data), "checkpoint.keep_last=9", fault=fault)
        assert running.steps_of(run)[-1] == kept
    ran = running.train(tmp_path, tiny_data, *mixture(tiny_data), "checkpoint.keep_last=9")
    assert ran.code == 0 and "going on after step 8" in ran.out, ran.told
    assert_same_run(whole, run)


@pytest.mark.parametrize("kept", [4, BORDER])
def test_on_another_number_of_ranks_it_goes_on_with_the_same_samples(
    tmp_path: Path, tiny_data: Path, kept: int
) -> None:
    """Killed before the change and just at it; the next session has two data-parallel ranks."""
    running.train_killed(
        tmp_path,
        tiny_data,
        *mixture(tiny_data),
        fault=partial(running.kill_in_step, kept + 1 if kept < BORDER else kept + 2),
    )
    assert running.steps_of(tmp_path / "run")[-1] == kept
    ran = running.train(tmp_path, tiny_data, *mixture(tiny_data), "parallel.zero=1", "batch.micro_size=1", world=2)
    assert ran.code == 0 and f"going on after step {kept}" in ran.out, ran.told
    ours, theirs = (running.lines_of(folder) for folder in (tmp_path / "run", uninterrupted(tiny_data)[0]))
    assert [line.get("step") for line in ours] == [line.get("step") for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.get("batch_hash") == other.get("batch_hash")
        name = "loss" if "loss" in one else "validation_loss"
        assert one[name] == pytest.approx(other[name], rel=1e-5)
        if name == "loss":
            assert one["sources"] == other["sources"]


def test_a_run_that_goes_back_over_a_change_of_weights_changes_them_at_the_same_step(
    tmp_path: Path, tiny_data: Path
) -> None:
    """From step 7, the first with other weights, to the checkpoint of step 4, and past the samples 18 to 37."""
    options = (*mixture(tiny_data), *REWIND, "checkpoint.every=4 steps")
    running.train_killed(tmp_path, tiny_data, *options, fault=_spoil_and_kill)
    ran = running.train(tmp_path, tiny_data, *options, fault=partial(spoil, 34))
    assert ran.code == 0 and "going on after step 4" in ran.out, ran.told
    run, skipped = tmp_path / "run", ((18, 38),)
    assert running.manifest_of(run, 12)["state"]["skipped"] == [[18, 38]]
    sources = Sources.open(load_config(run / "config.yaml"))
    stream = sources.stream(0, skipped)
    lines = [line for line in running.lines_of(run) if "batch_hash" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    number, seen = 0, np.zeros(2, np.int64)
    for line in lines:
        number = 38 if number == 18 else number
        numbers = np.arange(number, number + line["batch_size"])
        assert line["batch_hash"] == f"{batch_hash(numbers, stream.read(numbers)) % 2**64:016x}"
        seen += 32 * np.bincount(stream.order.locate(numbers)[0], minlength=2)
        assert [line["sources"][name]["tokens"] for name in ("code", "web")] == seen.tolist()
        number += line["batch_size"]
    changes = [line["sources"]["code"]["tokens"] for line in lines]
    assert np.mean(np.diff(changes[BORDER - 1 :])) > 2 * np.mean(np.diff([0, *changes[:BORDER]]))


def _spoil_and_kill() -> None:
    """In the second step behind the way back."""
    spoil(34)
    running.kill_in_step(9)


def test_metrics_count_the_tokens_of_each_source_as_they_were_read(tiny_data: Path) -> None:
    run = uninterrupted(tiny_data)[0]
    sources = Sources.open(load_config(run / "config.yaml"))
    lines = [line for line in running.lines_of(run) if "loss" in line]
    seen, number = np.zeros(2, np.int64), 0
    for line in lines:
        numbers = np.arange(number, number + line["batch_size"])
        seen += 32 * np.bincount(sources.train.order.locate(numbers)[0], minlength=2)
        number += line["batch_size"]
        assert [line["sources"][name]["tokens"] for name in ("code", "web")] == seen.tolist()
        assert sum(part["tokens"] for part in line["sources"].values()) == line["tokens"]
        sizes = [manifest.tokens for manifest in sources.train.manifests]
        epochs = [line["sources"][name]["epochs"] for name in ("code", "web")]
        assert epochs == pytest.approx([count / size for count, size in zip(seen, sizes, strict=True)])
    web = [line["sources"]["web"]["tokens"] for line in lines]
    assert np.mean(np.diff(web[:BORDER])) > 2 * np.mean(np.diff(web[BORDER:]))


def test_each_source_has_its_own_validation_beside_the_mean_of_all_targets(tmp_path: Path, tiny_data: Path) -> None:
    run, out = uninterrupted(tiny_data)
    lines = [line for line in running.lines_of(run) if "validation_loss" in line]
    assert [line["step"] for line in lines] == [0, 4, 8, 12]
    # The held-out folder of either source alone, of the same model: that of step 0, and as it learns.
    alone = {}
    for name, folder in (("web", "validation"), ("code", "train")):
        unheld = tuple(re.sub(r', "validation": "[^"]*"', "", option) for option in mixture(tiny_data))
        options = (*unheld, f"data.validation={tiny_data}/{folder}", "run.stop_at=0.34 of total")
        ran = running.train(tmp_path / name, tiny_data, *options)
        assert ran.code == 0, ran.told
        alone[name] = [line for line in running.lines_of(tmp_path / name / "run") if "validation_loss" in line]
        assert not any("sources" in line for line in alone[name])
    for number in (0, 1):
        for name in ("web", "code"):
            part, own = lines[number]["sources"][name], alone[name][number]
            assert part["validation_loss"] == pytest.approx(own["validation_loss"], rel=1e-6)
            assert part["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-6)
        counts = [alone[name][number]["validation_targets"] for name in ("web", "code")]
        losses = [alone[name][number]["validation_loss"] for name in ("web", "code")]
        mean = float(np.average(losses, weights=counts))
        assert lines[number]["validation_loss"] == pytest.approx(mean, rel=1e-6)
        assert lines[number]["validation_targets"] == sum(counts)
        bits = [line["bits_per_byte"] for line in (alone["web"][number], alone["code"][number])]
        assert min(bits) < lines[number]["bits_per_byte"] < max(bits)
    told = f"web {lines[0]['sources']['web']['validation_loss']:.4f}"
    assert next(line for line in out.splitlines() if line.startswith("step 0: validation loss")).endswith(told)


def test_each_source_has_the_same_validation_under_a_pipeline(tmp_path: Path, tiny_data: Path) -> None:
    options = (*mixture(tiny_data), "parallel.pipeline=2", "run.stop_at=0.01 of total")
    ran = running.train(tmp_path, tiny_data, *options, world=2)
    assert ran.code == 0, ran.told
    ours, theirs = (running.lines_of(run)[0] for run in (tmp_path / "run", uninterrupted(tiny_data)[0]))
    assert ours["step"] == theirs["step"] == 0 and ours["sources"].keys() == {"web", "code"}
    for name, found in ours["sources"].items():
        assert found == pytest.approx(theirs["sources"][name], rel=1e-5)


def test_sentence_pairs_find_their_partners_across_changes_and_behind_the_end(tmp_path: Path, tiny_data: Path) -> None:
    """A partner is a sample that comes later, of whatever source that is."""
    bert = (
        "model={kind: bert, num_layers: 2, hidden_size: 32, num_heads: 4, norm_position: post, dropout: 0.1}",
        "objective={kind: masked, pairs: next}",
    )
    ran = running.train(tmp_path, tiny_data, *bert, *mixture(tiny_data, epochs=2), "batch={size: 8, micro_size: 4}")
    assert ran.code == 0, ran.told
    last = running.lines_of(tmp_path / "run")[-1]
    assert last["step"] == 12 and set(last["sources"]["web"]) == {"validation_loss"}, "its targets are but a part"


def test_a_change_is_told_in_the_log_and_on_the_timeline(tiny_data: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, out = uninterrupted(tiny_data)
    words = "step 6: data.curriculum: from here code 80.00%, web 20.00%"
    assert out.splitlines().count(words) == 1
    assert "  code: 25.00% of the sequences at first;" in out
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("happened/mixture/text_summary")
    assert event.step == BORDER and words in event.tensor_proto.string_val[0].decode()
    scalars = running.scalars_of(run)
    assert [value for _, value in scalars["timeline/mixture"]] == [0.0] * 5 + [1.0] * 7
    lines = [line for line in running.lines_of(run) if "loss" in line]
    for name in ("web", "code"):
        for measure in ("tokens", "epochs"):
            expected = [(line["step"], line["sources"][name][measure]) for line in lines]
            assert [step for step, _ in scalars[f"sources/{measure}/{name}"]] == [step for step, _ in expected]
            values = [value for _, value in scalars[f"sources/{measure}/{name}"]]
            assert values == pytest.approx([value for _, value in expected], rel=1e-6)
        assert [step for step, _ in scalars[f"sources/validation_loss/{name}"]] == [0, 4, 8, 12]
        assert f"sources/bits_per_byte/{name}" in scalars


def test_a_run_without_named_sources_has_no_marks_of_them(tiny_data: Path) -> None:
    run = running.trained(tiny_data)
    assert not any("sources" in line for line in running.lines_of(run))
    assert not any(tag.startswith("sources/") or tag == "timeline/mixture" for tag in running.scalars_of(run))


def test_explain_names_the_source_of_a_sample(tiny_data: Path) -> None:
    sources = Sources.open(load_config(uninterrupted(tiny_data)[0] / "config.yaml"))
    stream = sources.train
    assert stream.names == ["code", "web"]
    for number in (0, 7, 60, 4000):
        found = stream.explain(number)
        source, sample = (int(part[0]) for part in stream.order.locate(np.array([number])))
        assert (found["name"], found["sample"]) == (stream.names[source], sample)
        assert found["source"].endswith({"web": "/train", "code": "/validation"}[found["name"]])
        visit = int(stream.order.visits(number)[number % 8, source])
        size = stream.order.sources[source].samples
        assert found["epoch"] == visit // len(range(number % 8, size, 8))


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ("data.train.web.weight=4", "data.train.web.weight"),
        ("data.train.code.epochs=3", "data.train.code.epochs"),
        ("data.curriculum.0.weights.web=2", "data.curriculum"),
        ("data.temperature=2", "data.temperature"),
    ],
)
def test_a_resume_with_another_mixture_is_refused_and_the_field_named(tiny_data: Path, change: str, path: str) -> None:
    run = uninterrupted(tiny_data)[0]
    assert_refused(running.command("train", run, change, "schedule.total=14 steps"), path)


def test_a_resume_with_other_shards_under_a_name_is_refused(tiny_data: Path) -> None:
    run = uninterrupted(tiny_data)[0]
    ran = running.command("train", run, f"data.train.code.folder={tiny_data}/train", "schedule.total=14 steps")
    assert_refused(ran, "was trained on other data")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ({"epochs": 0.01}, ""),
        ({"weight": None, "tokens": "9M"}, "the budgets of code are 9,000,000 tokens together, and the run has"),
        ({"weight": 1e-9}, "on code would give less than 1/4096 of the sequences"),
    ],
)
def test_what_a_mixture_cannot_give_is_told_before_the_run_begins(
    tmp_path: Path, tiny_data: Path, code: dict[str, Any], words: str
) -> None:
    options = (named(tiny_data, **code), "data.lanes=8", "schedule.total=12 steps")
    if words:
        assert_refused(running.train(tmp_path, tiny_data, *options), words)
        assert not (tmp_path / "run").exists()
        return
    ran = running.train(tmp_path, tiny_data, *options)  # a cap below one batch: the other gives all
    assert ran.code == 0 and "code has given what it may (epochs: 0.01)" in ran.out, ran.told


def test_held_out_text_of_another_tokenizer_is_refused_with_the_source(tmp_path: Path, tiny_data: Path) -> None:
    from pretrain.data.prepare import Options, prepare

    texts = tmp_path / "text.txt"
    texts.write_text("def twice(x):\n    return 2 * x\n" * 400)
    options = Options(vocab_size=290, validation=0, tokens_per_chunk=64)
    prepare([texts], tmp_path / "other", options, processes=1, say=lambda _: None)
    ran = running.train(tmp_path, tiny_data, named(tiny_data, validation=f"{tmp_path}/other/train"))
    assert_refused(ran, "data.train.code.validation", "another tokenizer", "--tokenizer")


# -- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_held_out_text_of_each_source_and_the_whole(tiny_data: Path) -> None:
    run = uninterrupted(tiny_data)[0]

    def evaluated(*arguments: str) -> dict[str, Any]:
        ran = running.command("evaluate", run, *arguments)
        assert ran.code == 0, ran.told
        found: dict[str, Any] = json.loads(ran.out)
        return found

    found = evaluated("--validation")
    web, code = evaluated("--data", f"{tiny_data}/validation"), evaluated("--data", f"{tiny_data}/train")
    assert found["sources"] == {"code": code, "web": web}
    assert found["tokens"] == web["tokens"] + code["tokens"] and found["step"] == 12
    nats = web["loss"] * web["tokens"] + code["loss"] * code["tokens"]
    assert found["loss"] == pytest.approx(nats / found["tokens"])
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / (web["bytes"] + code["bytes"]))


def test_evaluate_gives_the_held_out_data_of_a_run_without_names(tmp_path: Path, tiny_data: Path) -> None:
    run = running.trained(tiny_data)
    own = running.command("evaluate", run, "--validation")
    named = running.command("evaluate", run, "--data", tiny_data / "validation")
    assert own.code == 0 and json.loads(own.out) == json.loads(named.out)
    options = (
        "data.validation=null",
        "monitor.validate_every=null",
        "schedule.total=1 steps",
        "checkpoint.every=1 steps",
    )
    assert running.train(tmp_path, tiny_data, *options).code == 0
    refused = running.command("evaluate", tmp_path / "run", "--validation")
    assert_refused(refused, "--validation", "was trained without held-out data; name some with --data")


# -- lists of folders ------------------------------------------------------------------------------------------------


def test_a_list_of_folders_shares_by_size_and_temperature_without_names(tmp_path: Path, tiny_data: Path) -> None:
    folders = f"data.train=[{tiny_data}/train, {tiny_data}/validation]"

    def opened(*overrides: str) -> Sources:
        return Sources.open(load_config(write_config(tmp_path, tiny_data), [folders, *overrides]))

    sources = opened("data.temperature=2")
    tokens = [manifest.tokens for manifest in sources.train.manifests]
    assert sources.train.recipe["weights"] == pytest.approx([np.sqrt(count) for count in tokens])
    assert "mixture" not in sources.train.recipe and sources.train.names is None
    numbers = np.arange(60 * 4096)
    share = float(np.mean(sources.train.order.locate(numbers)[0] == 0))
    assert share == pytest.approx(np.sqrt(tokens[0]) / sum(np.sqrt(tokens)), abs=1e-3)
    assert opened().train.recipe["weights"] == [float(part.samples) for part in opened().train.order.sources]
