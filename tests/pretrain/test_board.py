"""TensorBoard's files, read back by TensorBoard: every group of scalars, texts, the config, hyperparameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.pretrain import running
from tests.pretrain.running import train

TAGS = {
    *("loss/train", "optimizer/grad_norm", "optimizer/learning_rate", "optimizer/batch_size"),
    *("speed/tokens_per_second", "speed/step_seconds", "speed/mfu", "speed/hfu"),
    *("system/memory_gibibytes", "speed/data_wait_seconds", "optimizer/epochs"),
    *("system/checkpoint_stall_seconds", "system/checkpoint_write_seconds"),
    *("loss/validation", "loss/bits_per_byte"),
    *("timeline/checkpoint", "timeline/resume", "timeline/skip"),
}


@pytest.fixture(scope="module")
def run(tiny_data: Path) -> Path:
    return running.trained(tiny_data)


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def text_of(events: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(tag)]


def hparams_of(events: EventAccumulator, tag: str) -> HParamsPluginData:
    data: Any = events.SummaryMetadata(tag).plugin_data.content
    return HParamsPluginData.FromString(data)


def test_there_is_every_group_and_no_other(events: EventAccumulator) -> None:
    assert set(events.Tags()["scalars"]) == TAGS


@pytest.mark.parametrize(
    ("tag", "field", "scale"),
    [
        ("loss/train", "loss", 1),
        ("optimizer/grad_norm", "grad_norm", 1),
        ("optimizer/learning_rate", "learning_rate", 1),
        ("optimizer/batch_size", "batch_size", 1),
        ("speed/tokens_per_second", "tokens_per_second", 1),
        ("speed/step_seconds", "step_seconds", 1),
        ("speed/mfu", "mfu", 1),
        ("speed/hfu", "hfu", 1),
        ("speed/data_wait_seconds", "data_seconds", 1),
        ("system/memory_gibibytes", "memory_bytes", 2**-30),
        ("loss/validation", "validation_loss", 1),
        ("loss/bits_per_byte", "bits_per_byte", 1),
    ],
)
def test_scalars_are_those_of_the_metrics_at_their_steps(run: Path, tag: str, field: str, scale: float) -> None:
    lines = [line for line in running.lines_of(run) if field in line]
    found = running.scalars_of(run)[tag]
    assert [step for step, _ in found] == [line["step"] for line in lines]
    assert [value for _, value in found] == pytest.approx([line[field] * scale for line in lines], rel=1e-6)


def test_epochs_are_samples_over_the_samples_of_the_shards(run: Path, tiny_data: Path) -> None:
    import json

    manifest = json.loads((tiny_data / "train" / "manifest.json").read_text())
    samples = (manifest["tokens"] - 1) // 32  # 32 divides the chunks
    lines = [line for line in running.lines_of(run) if "loss" in line]
    expected = [line["samples"] / samples for line in lines]
    assert [value for _, value in running.scalars_of(run)["optimizer/epochs"]] == pytest.approx(expected, rel=1e-6)


def test_the_config_is_there_as_it_was_resolved(run: Path, events: EventAccumulator) -> None:
    [(_, text)] = text_of(events, "config/text_summary")
    shown = "\n".join(line.removeprefix("    ") for line in text.splitlines())
    assert shown.strip() == (run / "config.yaml").read_text().strip()


def test_texts_by_the_model_are_there(run: Path, events: EventAccumulator) -> None:
    """Every 6 steps; the same as on the terminal."""
    texts = text_of(events, "samples/text_summary")
    assert [step for step, _ in texts] == [6, 12]
    told = (run.parent / "stdout").read_text()
    for step, text in texts:
        assert text.strip()
        assert f"step {step}, a text by the model:\n  | {text.splitlines()[0].removeprefix('    ')}"[:60] in told


def test_hyperparameters_name_the_final_metric_and_the_run_that_ended(run: Path, events: EventAccumulator) -> None:
    experiment = hparams_of(events, EXPERIMENT_TAG).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["loss/validation"]
    start = hparams_of(events, SESSION_START_INFO_TAG).session_start_info
    assert start.hparams["optimizer.learning_rate"].number_value == pytest.approx(1e-2)
    assert start.hparams["data.seq_length"].number_value == 32
    assert start.hparams["run.seed"].number_value == 1
    assert start.hparams["model.num_layers"].number_value == 2
    assert start.hparams["parameters"].number_value > 1000
    assert {info.name for info in experiment.hparam_infos} == set(start.hparams)
    assert hparams_of(events, SESSION_END_INFO_TAG).session_end_info.status == 1  # STATUS_SUCCESS
    last = [line["validation_loss"] for line in running.lines_of(run) if "validation_loss" in line][-1]
    assert running.scalars_of(run)["loss/validation"][-1][1] == pytest.approx(last)


def test_without_held_out_data_the_metric_is_the_training_loss(tmp_path: Path, tiny_data: Path) -> None:
    options = ("data.validation=null", "monitor.validate_every=null", "monitor.tensorboard=true")
    assert train(tmp_path, tiny_data, *options, "schedule.total=2 steps").code == 0
    accumulator = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    accumulator.Reload()
    experiment = hparams_of(accumulator, EXPERIMENT_TAG).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["loss/train"]
    assert "loss/validation" not in accumulator.Tags()["scalars"]


def test_no_files_where_it_is_off(tmp_path: Path, tiny_data: Path) -> None:
    assert train(tmp_path, tiny_data, "monitor.tensorboard=false", "schedule.total=1 steps").code == 0
    assert not (tmp_path / "run" / "tensorboard").exists()
