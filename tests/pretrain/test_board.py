"""TensorBoard's files, read back by TensorBoard: every group of scalars, texts, the config, hyperparameters."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from pretrain.board import Board
from pretrain.charts import EVENTS
from pretrain.config.run import Config
from pretrain.errors import Exit
from tests.pretrain import running
from tests.pretrain.running import train

TAGS = {
    *("loss/train", "optimizer/grad_norm", "optimizer/learning_rate", "optimizer/batch_size"),
    *("speed/tokens_per_second", "speed/step_seconds", "speed/mfu", "speed/hfu"),
    *("system/memory_gibibytes", "speed/data_wait_seconds", "optimizer/epochs"),
    *("system/checkpoint_stall_seconds", "system/checkpoint_write_seconds"),
    *("loss/validation", "loss/bits_per_byte"),
    *(f"timeline/{kind}" for kind in EVENTS),
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
    [(_, text)] = text_of(events, "settings/text_summary")
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


# -- what happened when ----------------------------------------------------------------------------------------------


def poison_and_stop() -> None:
    running.poison_steps(2, 1, float("nan"))
    running.signal_in_step(5, signal.SIGTERM)


def happened(run: Path, kind: str) -> list[int]:
    """Steps of the timeline's points at which its count goes up."""
    points = [(0, 0.0), *running.scalars_of(run)[f"timeline/{kind}"]]
    ups = [(step, value - before) for (_, before), (step, value) in itertools.pairwise(points)]
    assert all(up >= 0 for _, up in ups)
    return [step for step, up in ups if up]


def test_the_timeline_marks_a_skipped_step_each_checkpoint_and_where_the_run_went_on(
    tmp_path: Path, tiny_data: Path
) -> None:
    """Step 2 is skipped; checkpoints of 3, 4 (validated best), and 5 where it is stopped; the new session begins behind it."""
    run, options = tmp_path / "run", ("monitor.tensorboard=true", "schedule.total=8 steps")
    assert train(tmp_path, tiny_data, *options, fault=poison_and_stop).code == Exit.STOPPED
    assert happened(run, "skip") == [2] and happened(run, "resume") == []
    assert train(tmp_path, tiny_data, *options).code == 0
    assert happened(run, "skip") == [2] and happened(run, "resume") == [6]
    assert running.scalars_of(run)["timeline/checkpoint"][5] == (6, 3.0), "also that with which the first session ended"
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    texts = {kind: text_of(events, f"happened/{kind}/text_summary") for kind in ("skip", "resume", "checkpoint")}
    assert [step for step, _ in texts["skip"]] == [2] and "no finite gradient norm" in texts["skip"][0][1]
    assert [(step, text.strip()) for step, text in texts["resume"]] == [(5, "going on after step 5")]
    assert {step for step, _ in texts["checkpoint"]} >= {3, 4, 5, 6, 8}
    assert [step for step, _ in running.scalars_of(run)["loss/train"]] == list(range(1, 9))


def test_a_run_set_back_has_each_step_once_for_new_eyes_and_for_open_ones(tmp_path: Path) -> None:
    """Steps 1 to 6, then back to 3 and on to 5, while TensorBoard's own reader follows the folder."""
    config = Config.model_validate({"run": {"dir": str(tmp_path)}})
    board = Board(config, 0, 10)
    open_eyes = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})

    def write(steps: range, loss: float) -> None:
        for step in steps:
            board.scalars(step, {"loss": loss})
            board.timeline(step)
        board.flush()
        open_eyes.Reload()

    write(range(1, 7), 1.0)
    board.close(ended=False)
    board = Board(config, 3, 10)
    board.event("skip", 3, "gone back")
    write(range(4, 6), 2.0)
    board.close(ended=True)
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert running.scalars_of(tmp_path)["loss/train"] == expected
    assert [(event.step, event.value) for event in open_eyes.Scalars("loss/train")] == expected
    assert happened(tmp_path, "skip") == [4]


def test_layers_norms_and_histograms_are_there_at_their_steps_with_a_chart_of_their_own(
    tmp_path: Path, tiny_data: Path
) -> None:
    options = ("monitor.tensorboard=true", "monitor.norms_every=4 steps", "monitor.histograms_every=8 steps")
    assert train(tmp_path, tiny_data, *options, "schedule.total=8 steps").code == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    layers = {"embedding", "blocks.0", "blocks.1", "norm"}
    for group in ("weight", "weight_gradient"):
        tags = {tag.split("/")[1] for tag in events.Tags()["scalars"] if tag.startswith(f"{group}_norm/")}
        assert (
            tags == layers == {tag.split("/")[1] for tag in events.Tags()["histograms"] if tag.startswith(f"{group}/")}
        )
        assert [event.step for event in events.Scalars(f"{group}_norm/blocks.1")] == [4, 8]
        [found] = events.Histograms(f"{group}/blocks.1")
        assert found.step == 8 and sum(found.histogram_value.bucket) == found.histogram_value.num > 1000
    text = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"norms of gradients" in text and b"weight_norm/" in text


@pytest.mark.parametrize("field", ["norms_every", "histograms_every"])
def test_what_would_go_into_a_board_that_is_off_is_refused(field: str, tmp_path: Path, tiny_data: Path) -> None:
    ran = train(tmp_path, tiny_data, "monitor.tensorboard=false", f"monitor.{field}=2 steps")
    running.assert_refused(ran, f"monitor.{field}: goes into TensorBoard")
