"""What runs came to, from their metrics: final and best scores with floors, and the figures over several runs by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.results import METRICS, Metric, floor_of, of_run, of_several, write_result

ACCURACY, LOSS = Metric.of("classification"), Metric.of("instruction")


def run_of(folder: Path, *validations: dict[str, Any]) -> Path:
    lines = [{"step": 1, "loss": 2.0}, *({"validation_targets": 9, **line} for line in validations)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(step: int, loss: float | None, accuracy: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "validation_loss": loss,
        "validation_accuracy": accuracy,
        "floor_validation_accuracy": 0.4,
        "floor_validation_loss": 1.1,
    }


def test_a_run_has_its_final_and_best_scores_and_their_floors(tmp_path: Path) -> None:
    run = run_of(tmp_path, line(0, 1.2, 0.3), line(4, 0.9, 0.7), line(8, 0.8, 0.7), line(12, 0.7, 0.6))
    found = of_run(run, "classification", {"run.seed": 3, "data.seed": 5})
    assert found == {
        "metric": "validation_accuracy",
        "run.seed": 3,
        "data.seed": 5,
        "final": {"step": 12, "validation_loss": 0.7, "validation_accuracy": 0.6},
        "best": {"step": 4, "validation_loss": 0.9, "validation_accuracy": 0.7},
        "floor": {"validation_accuracy": 0.4, "validation_loss": 1.1},
    }
    by_loss = of_run(run, "instruction", {})
    assert by_loss is not None and by_loss["best"]["step"] == 12
    write_result(tmp_path, found)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    write_result(tmp_path, {"variance": {"f": math.inf}, "all": [1.0, math.nan]})
    assert json.loads((tmp_path / "result.json").read_text()) == {"variance": {"f": None}, "all": [1.0, None]}


def test_what_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    run = run_of(tmp_path, line(0, 1.0, 0.5), line(4, None, None))
    found = of_run(run, "classification", {})
    assert found is not None and found["best"]["step"] == 0 and found["final"]["validation_loss"] is None
    assert LOSS.best(run_of(tmp_path, line(0, None, None))) is None
    assert of_run(run_of(tmp_path), "classification", {}) is None and floor_of(tmp_path) == {}


def test_several_runs_by_hand() -> None:
    """The expected best of two draws of three runs: 1/9, 3/9 and 5/9 of the lowest to the highest."""
    found = of_several(ACCURACY, [0.5, 0.8, None, 0.6], floor=0.5)
    assert found["mean"] == pytest.approx(1.9 / 3) and found["best"] == 0.8 and found["floor"] == 0.5
    assert found["standard_deviation"] == pytest.approx(math.sqrt(sum((x - 1.9 / 3) ** 2 for x in (0.5, 0.8, 0.6)) / 2))
    assert found["expected_best"][:2] == pytest.approx([1.9 / 3, (0.5 + 3 * 0.6 + 5 * 0.8) / 9])
    assert found["share_failed"] == 0.5, "one without a score, one no better than the floor"


def test_of_losses_the_lower_is_the_better() -> None:
    found = of_several(LOSS, [2.0, 1.0, 3.0], floor=2.5)
    assert found["best"] == 1.0 and found["share_failed"] == pytest.approx(1 / 3)
    assert found["expected_best"][1] == pytest.approx((3.0 + 3 * 2.0 + 5 * 1.0) / 9)
    assert of_several(LOSS, [2.0], None)["share_failed"] == 0.0
    assert of_several(LOSS, [2.0], None)["standard_deviation"] is None


def test_every_metric_has_a_floor_or_is_a_loss() -> None:
    assert all(metric.higher and metric.name.startswith("validation_") for metric in METRICS.values())
