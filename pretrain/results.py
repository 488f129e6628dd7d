"""What a run of a task came to, and what several runs of one setting came to: `result.json`, in the run's or the sweep's folder.

The one place where scores are taken from metrics.jsonl. A run's score is the best of its validations, as its best checkpoint
has it; what training reaches without learning anything stands beside it as its floor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.metrics import read_metrics
from pretrain.tasks import trials as statistics

RESULT = "result.json"
PREFIX = "validation_"
FLOOR = "floor_"
LEFT_OUT = ("step", "tokens", "validation_targets")


class Metric(NamedTuple):
    """A field of the validations in metrics.jsonl, by which runs are compared."""

    name: str
    higher: bool  # is better

    @classmethod
    def of(cls, objective: str) -> Metric:
        """Of a kind of objective; the loss where it has no other."""
        return METRICS.get(objective, cls("validation_loss", False))

    @property
    def sign(self) -> float:
        """Of a score times this the higher is the better."""
        return 1.0 if self.higher else -1.0

    def best(self, run: Path) -> dict[str, Any] | None:
        """The line of a run's best validation, the first of equals; None where none has a number."""
        lines = [line for line in validations(run) if _is_number(line.get(self.name))]
        return max(lines, key=lambda line: self.sign * line[self.name], default=None)


METRICS = {
    "classification": Metric("validation_accuracy", True),
    "multiple-choice": Metric("validation_accuracy", True),
    "regression": Metric("validation_spearman", True),
    "tagging": Metric("validation_f1", True),
    "question-answering": Metric("validation_f1", True),
}


def validations(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that are of a validation, oldest first."""
    return (line for line in read_metrics(run) if "validation_loss" in line)


def floor_of(run: Path) -> dict[str, float]:
    """What a run's validations reach without learning, by their names; of a task alone."""
    told = next((line for line in validations(run) if any(name.startswith(FLOOR) for name in line)), {})
    return {name.removeprefix(FLOOR): value for name, value in told.items() if name.startswith(FLOOR)}


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """RESULT in a folder, whole or as it was; null where a number is not finite."""
    partial = folder / f".{RESULT}.partial"
    partial.write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n")
    os.replace(partial, folder / RESULT)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- one run -----------------------------------------------------------------------------------------------------------


def of_run(run: Path, objective: str, seeds: dict[str, int]) -> dict[str, Any] | None:
    """Final and best scores of a run of a task, with their floors; None before its first validation. seeds: by their fields."""
    metric, lines = Metric.of(objective), list(validations(run))
    if not lines:
        return None
    best = metric.best(run)
    return {
        "metric": metric.name,
        **seeds,
        "final": _scores(lines[-1]),
        "best": None if best is None else _scores(best),
        "floor": floor_of(run),
    }


def _scores(line: dict[str, Any]) -> dict[str, Any]:
    """The step and what was measured in it."""
    held = {name: value for name, value in line.items() if name.startswith(PREFIX) and name not in LEFT_OUT}
    return {"step": line["step"], **held}


# -- several -----------------------------------------------------------------------------------------------------------


def of_several(metric: Metric, scores: Sequence[float | None], floor: float | None) -> dict[str, Any]:
    """Of the runs of one setting, of which at least one has a score: mean, standard deviation, best, expected best of n
    for each n (Dodge et al. 2019, arXiv 1909.03004), floor, and the share of failed runs: those without a score, and those
    that are not clearly above the floor."""
    known = [score for score in scores if score is not None]
    signed = [metric.sign * score for score in known]
    failed = [math.nan if score is None else metric.sign * score for score in scores]
    least = -math.inf if floor is None else metric.sign * floor
    return {
        "mean": statistics.mean(known),
        "standard_deviation": statistics.standard_deviation(known),
        "best": metric.sign * max(signed),
        "expected_best": [metric.sign * statistics.expected_best(signed, n) for n in range(1, len(signed) + 1)],
        "floor": floor,
        "share_failed": statistics.share_failed(failed, least),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
