"""metrics.jsonl and summary.json say what happened, and their meters leave out what they say they leave out."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pretrain.metrics import Metrics, read_metrics
from tests.pretrain import running
from tests.pretrain.running import train

STEP_FIELDS = {"step", "tokens", "samples", "loss", "grad_norm", "learning_rate", "batch_size", "batch_hash"}
SAVES = {"checkpoint_stall_seconds", "checkpoint_write_seconds"}
RATES = {"tokens_per_second", "step_seconds", "data_seconds"}
VALIDATION_FIELDS = {"step", "tokens", "validation_loss", "bits_per_byte", "validation_targets"}
SIZES = [4, 4, 4, 6, 6, 6, 8, 8, 8, 8, 8, 8]  # of the ramp in running.SHORT


@pytest.fixture(scope="module")
def run(tiny_data: Path) -> Path:
    return running.trained(tiny_data)


@pytest.fixture(scope="module")
def steps(run: Path) -> list[dict[str, Any]]:
    return [line for line in running.lines_of(run) if "loss" in line]


def test_every_step_has_the_promised_fields(run: Path, steps: list[dict[str, Any]]) -> None:
    """The first step of a process compiles and warms up: it has no rates."""
    assert set(steps[0]) == STEP_FIELDS | {"memory_bytes"}
    for line in steps[1:]:
        assert set(line) - SAVES == STEP_FIELDS | RATES | {"memory_bytes", "mfu", "hfu"}
    for line in running.lines_of(run):
        assert "loss" in line or set(line) == VALIDATION_FIELDS


def test_a_save_is_told_of_with_its_times_in_the_first_step_after_it(run: Path, steps: list[dict[str, Any]]) -> None:
    """The last one, of the end, in the summary. The saves of the steps 3 and 4 are behind each other, so that the first
    is over when the second begins."""
    told = [line for line in steps if set(line) >= SAVES]
    assert all(0 < line[name] < 60 for line in told for name in SAVES)
    assert len(told) == sum(bool(SAVES & set(line)) for line in steps)
    assert told[0]["step"] in (4, 5) and len(told) >= 3
    summary = json.loads((run / "summary.json").read_text())
    assert all(0 < summary[name] < 60 for name in SAVES)


def test_steps_samples_and_tokens_are_those_of_the_ramp(steps: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["batch_size"] for line in steps] == SIZES
    assert [line["samples"] for line in steps] == np.cumsum(SIZES).tolist()
    assert [line["tokens"] for line in steps] == (32 * np.cumsum(SIZES)).tolist()


def test_the_learning_rate_is_the_one_that_was_used(steps: list[dict[str, Any]]) -> None:
    """2 steps of warm-up to 1e-2, then half a cosine to a tenth of it at step 12."""
    decay = [0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2 for step in range(3, 13)]
    assert [line["learning_rate"] for line in steps] == pytest.approx([0.005, 0.01, *(0.01 * part for part in decay)])


def test_the_batch_hash_is_of_the_tokens_that_the_step_took(tiny_data: Path, steps: list[dict[str, Any]]) -> None:
    """The wrapping sum of xxh64(the sample's 33 ids as 32-bit little-endian, seed = its number)."""
    from pretrain.data.stream import Stream

    with_data = Stream([tiny_data / "train"], 32, seed=1)
    first = 0
    for line, size in zip(steps, SIZES, strict=True):
        numbers = list(range(first, first + size))
        rows = with_data.read(np.array(numbers))
        hashes = [
            xxhash.xxh64(np.asarray(row, "<u4").tobytes(), seed=n).intdigest()
            for n, row in zip(numbers, rows, strict=True)
        ]
        assert line["batch_hash"] == f"{sum(hashes) % 2**64:016x}"
        first += size
    with_data.close()


def test_rates_agree_with_each_other_and_with_the_tokens(steps: list[dict[str, Any]]) -> None:
    for line in steps[1:]:
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(32 * line["batch_size"])
        assert 0 <= line["data_seconds"] <= line["step_seconds"]
        assert 2**26 < line["memory_bytes"] < 2**36


# 2 layers of 32 with 4 heads and three feed-forward matrices of 64; 33 / 2 of 32 keys are seen in the mean.
BLOCKS, HEAD, SCORES = 2 * (4 * 32 * 32 + 3 * 32 * 64), 512 * 32, 2 * 2 * 32 * 33 / 2
PEAK = 0.5e12


def test_mfu_is_the_share_of_the_given_peak(steps: list[dict[str, Any]]) -> None:
    """2 FLOPs a product, forward once and backward twice. Without recomputation HFU is the same."""
    flops = 3 * 2 * (BLOCKS + HEAD + SCORES)
    for line in steps[1:]:
        assert line["mfu"] == line["hfu"] == pytest.approx(line["tokens_per_second"] * flops / PEAK)


@pytest.mark.parametrize(("recompute", "again"), [("selective", 2 * SCORES), ("full", 2 * (BLOCKS + SCORES))])
def test_hfu_counts_recomputation_and_is_told_beside_mfu(
    tmp_path: Path, tiny_data: Path, recompute: str, again: float
) -> None:
    options = (f"parallel.recompute={recompute}", "schedule.total=3 steps", "monitor.peak_tflops=0.5")
    ran = train(tmp_path, tiny_data, *options)
    assert ran.code == 0, ran.told
    flops = 3 * 2 * (BLOCKS + HEAD + SCORES)
    lines = [line for line in running.lines_of(tmp_path / "run") if "mfu" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / PEAK)
        assert line["hfu"] == pytest.approx(line["tokens_per_second"] * (flops + again) / PEAK)
        assert f"MFU {line['mfu']:.1%}, HFU {line['hfu']:.1%}, ETA " in ran.out


def slow_by_the_clock() -> None:
    """By the program's clock every validation and every save takes 100 seconds longer, and every step 20."""
    from parallel.replicated import PlainEngine
    from pretrain.saving import Saver
    from pretrain.validation import Validation

    real, ahead = time.perf_counter, [0.0]
    time.perf_counter = lambda: real() + ahead[0]
    for owner, name, seconds in ((Validation, "run", 100), (Saver, "save", 100), (PlainEngine, "step", 20)):
        original = getattr(owner, name)

        def call(*args: Any, original: Any = original, seconds: int = seconds) -> Any:
            ahead[0] += seconds
            return original(*args)

        setattr(owner, name, call)


def test_rates_hold_the_step_but_not_validation_and_saving_and_no_mfu_without_a_peak(
    tmp_path: Path, tiny_data: Path
) -> None:
    """Steps 2 and 3 hold or follow a validation and a save."""
    options = ("schedule.total=4 steps", "monitor.validate_every=2 steps", "checkpoint.every=2 steps")
    assert train(tmp_path, tiny_data, *options, fault=slow_by_the_clock).code == 0
    lines = [line for line in running.lines_of(tmp_path / "run") if "loss" in line]
    assert all(20 <= line["step_seconds"] < 60 for line in lines[1:])
    assert not any("mfu" in line or "hfu" in line for line in lines)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens_per_second"] <= 32 * 6 / 20
    assert 580 <= summary["session_seconds"] < 640, "4 steps, 3 validations, 2 saves"


def test_an_interval_is_the_mean_of_its_steps(tmp_path: Path, tiny_data: Path) -> None:
    assert train(tmp_path, tiny_data, "monitor.log_every=4 steps", "schedule.total=10 steps").code == 0
    lines = [line for line in running.lines_of(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 10]
    for line, tokens in zip(lines, (4 + 4 + 6, 6 + 6 + 8 + 8, 8 + 8), strict=True):
        steps = 3 if line["step"] == 4 else 4 if line["step"] == 8 else 2
        assert line["tokens_per_second"] * line["step_seconds"] * steps == pytest.approx(32 * tokens)


def test_the_summary_tells_how_it_ended(run: Path, steps: list[dict[str, Any]]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    validations = [line["validation_loss"] for line in running.lines_of(run) if "validation_loss" in line]
    best = min(validations)
    assert summary["reason"] == "finished" and summary["step"] == 12
    assert summary["samples"] == sum(SIZES) and summary["tokens"] == 32 * sum(SIZES)
    assert summary["loss"] == steps[-1]["loss"] and summary["validation_loss"] == validations[-1]
    assert summary["best_validation_loss"] == best
    assert summary["best_step"] == [0, 4, 8, 12][validations.index(best)]
    assert summary["parameters"] == sum(
        value.numel() for name, value in running.tensors_of(run, 12).items() if "exp_avg" not in name
    )
    rates = [line["tokens_per_second"] for line in steps[1:]]
    assert min(rates) <= summary["tokens_per_second"] <= max(rates)


# -- the file --------------------------------------------------------------------------------------------------------


def test_lines_are_on_the_disk_when_they_are_written(tmp_path: Path) -> None:
    """So that a SIGKILL takes none."""
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1, "loss": 2.0})
    assert list(read_metrics(tmp_path)) == [{"step": 1, "loss": 2.0}]
    metrics.close()


def test_a_run_at_step_0_begins_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "validation_loss": 6.0}\n{"step": 1, "loss": 5.0}\n')
    Metrics(tmp_path, 0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_what_lies_beyond_the_step_goes_and_so_do_broken_lines(tmp_path: Path) -> None:
    whole = '{"step": 0, "validation_loss": 6.0}\n{"step": 4, "loss": 5.0}\n{"step": 4, "validation_loss": 5.5}\n'
    broken = '[1]\n{"loss": 3}\nnonsense\n{"step": "4"}\n{"step": 5, "loss": 4.0}\n\xff\xfe\n{"step": 4, "los'
    (tmp_path / "metrics.jsonl").write_text(whole + broken, encoding="latin-1")
    Metrics(tmp_path, 4).close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'
