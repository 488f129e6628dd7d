"""Sweeps: what is tried, what is stopped early, what the scores say together; and that a stopped sweep goes on."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from pretrain import sweep, viewer
from pretrain.errors import UserError
from pretrain.sweep import ORDER, WEIGHTS, Rung, Trial, _two_way, analysis, f_tail, rungs_of, searched, seeds
from tests.pretrain import running
from tests.pretrain.browsing import browser, session_groups
from tests.pretrain.finetuning import tiny


def test_seeds_are_a_grid_apart_from_each_other() -> None:
    found = [dict(overrides) for overrides in seeds(2, 3, first=5)]
    assert [(one[WEIGHTS], one[ORDER]) for one in found] == [(5, 5), (5, 6), (5, 7), (6, 5), (6, 6), (6, 7)]


def test_a_search_is_every_combination() -> None:
    found = searched(["optimizer.learning_rate=1e-5,3e-5", "optimizer.betas=[0.9, 0.95],[0.9, 0.999]"], None, 1)
    assert len(found) == 4 and dict(found[1]) == {"optimizer.learning_rate": 1e-5, "optimizer.betas": [0.9, 0.999]}


def test_draws_fill_their_range_and_depend_on_seed_and_number_alone() -> None:
    fields = ["optimizer.learning_rate=1e-6..1e-2:log", "model.dropout=0..0.5", "batch.size=8,16,32"]
    many = searched(fields, 2000, seed=3)
    assert many[:10] == searched(fields, 10, seed=3) and many != searched(fields, 2000, seed=4)
    rates, dropouts, sizes = (np.array([dict(one)[field.split("=")[0]] for one in many]) for field in fields)
    assert rates.min() > 1e-6 and rates.max() < 1e-2 and abs(np.log10(rates).mean() + 4) < 0.15
    assert dropouts.min() >= 0 and dropouts.max() < 0.5 and abs(dropouts.mean() - 0.25) < 0.02
    assert all(abs((sizes == size).mean() - 1 / 3) < 0.05 for size in (8, 16, 32))
    assert abs(np.corrcoef(np.log(rates), dropouts)[0, 1]) < 0.1


@pytest.mark.parametrize("field", ["a", "a=", "=1", "a=1..x", "a=2..1", "a=0..1:log", "a=1..2:cube"])
def test_a_search_that_is_not_understood_is_refused(field: str) -> None:
    with pytest.raises(UserError, match="--search"):
        searched([field], 3, 1)


def test_a_range_needs_a_number_of_draws() -> None:
    with pytest.raises(UserError, match="a range has no grid; give values, or --trials N"):
        searched(["a.b=1..2"], None, 1)


def options(**values: Any) -> Namespace:
    return Namespace(**{"keep": None, "at": 0.3, "halving": False, "plan": False, **values})


def test_rungs() -> None:
    assert rungs_of(options(), 9) == []
    assert rungs_of(options(keep=3), 9) == [Rung(0.3, 3)]
    halving = rungs_of(options(halving=True), 9)
    assert [(round(rung.share, 4), rung.keep) for rung in halving] == [(0.1111, 3), (0.3333, 1)]
    for wrong in (options(keep=10), options(keep=0), options(keep=2, at=1.0), options(keep=2, halving=True)):
        with pytest.raises(UserError):
            rungs_of(wrong, 9)


@pytest.mark.parametrize("first", [1, 2, 4, 24])
@pytest.mark.parametrize("second", [1, 3, 16, 96])
@pytest.mark.parametrize("f", [0.0, 0.01, 0.7, 1.0, 3.3, 40.0, 1e4])
def test_the_tail_of_f_is_scipys(f: float, first: int, second: int) -> None:
    assert f_tail(f, first, second) == pytest.approx(scipy.stats.f.sf(f, first, second), rel=1e-9, abs=1e-300)


def test_the_analysis_of_variance_is_a_regressions() -> None:
    """Against the sums of squares that least squares leave with and without each factor."""
    values = np.random.default_rng(2).normal(size=(4, 6)) + np.arange(4)[:, None]
    row, column = (np.eye(4)[np.repeat(np.arange(4), 6)], np.eye(6)[np.tile(np.arange(6), 4)])

    def left(*factors: np.ndarray) -> float:
        design = np.hstack([np.ones((24, 1)), *factors])
        residual = values.ravel() - design @ np.linalg.lstsq(design, values.ravel(), rcond=None)[0]
        return float(residual @ residual)

    rest = left(row, column) / 15
    found = _two_way(values)
    assert found["weights"]["f"] == pytest.approx((left(column) - left(row, column)) / 3 / rest)
    assert found["order"]["f"] == pytest.approx((left(row) - left(row, column)) / 5 / rest)
    assert found["weights"]["p"] < 0.01 < found["order"]["p"]


def test_there_is_no_analysis_without_a_full_grid() -> None:
    trials = [Trial(one, Path(str(number))) for number, one in enumerate(seeds(2, 2, 1))]
    scores: dict[str, float | None] = {"0": 0.1, "1": 0.2, "2": 0.3, "3": 0.5}
    assert analysis(trials, scores) is not None
    assert analysis(trials, {**scores, "3": None}) is None
    assert analysis(trials[:2], scores) is None
    assert analysis([Trial((("a", 1),), Path("0"))], scores) is None


# -- real trials -------------------------------------------------------------------------------------------------------


class Runner:
    """Trials in forked processes; counts them, and stops the sweep after some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 99) -> None:
        self.started: list[tuple[str, bool]] = []
        self.most = most

        def run(command: list[str], **_: Any) -> Any:
            assert command[1:4] == ["-m", "pretrain", "train"]
            if len(self.started) == self.most:
                raise KeyboardInterrupt
            trial = next(word for word in command if word.startswith("run.dir=")).split("/")[-2]
            self.started.append((trial, any("stop_at" in word for word in command)))
            return running.command(*command[3:], timeout=120)._asdict() and Namespace(returncode=self._code(command))

        monkeypatch.setattr(sweep.subprocess, "run", run)

    def _code(self, command: list[str]) -> int:
        return 0


def arguments(config: Path, out: Path, *overrides: str, **values: Any) -> Namespace:
    made = {"config": str(config), "overrides": list(overrides), "out": str(out), "search": [], "trials": None}
    return options(**{**made, "seeds_weights": 1, "seeds_order": 1, "first_seed": 1, **values})


SHORT = (
    "schedule.total=8 steps",
    "schedule.warmup=0 steps",
    "monitor.validate_every=2 steps",
    "checkpoint.every=2 steps",
)


def test_a_sweep_over_seeds_stops_early_goes_on_and_tells(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path, "classification", tiny.bert(tiny_data), train=64)
    args = arguments(config, tmp_path / "sweep", *SHORT, seeds_weights=2, seeds_order=2, keep=2, at=0.5)
    with pytest.raises(KeyboardInterrupt):
        Runner(monkeypatch, most=3) and sweep.main(args)
    runner = Runner(monkeypatch)
    assert sweep.main(args) == 0
    assert [stop for _, stop in runner.started] == [True] * 4 + [False] * 2
    result = json.loads((tmp_path / "sweep" / "result.json").read_text())
    scores = {trial["name"]: trial["score"] for trial in result["trials"]}
    going = {name for name, stop in runner.started if not stop}
    assert {trial["name"] for trial in result["trials"] if trial["finished"]} == going
    for name in scores:
        last = running.steps_of(tmp_path / "sweep" / "trials" / name / "run")[-1]
        assert last == (8 if name in going else 4)
    assert result["best"] == max(scores[name] for name in going) and result["metric"] == "validation_accuracy"
    assert result["expected_best"][0] == pytest.approx(result["mean"]) and result["floor"] is not None
    assert len({json.dumps(trial["score"]) for trial in result["trials"]}) > 1, "seeds differ"
    assert [(one["run.seed"], one["data.seed"]) for one in result["trials"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for name, score in scores.items():
        alone = json.loads((tmp_path / "sweep" / "trials" / name / "run" / "result.json").read_text())
        assert alone["metric"] == "validation_accuracy" and alone["best"]["validation_accuracy"] == score
        assert alone["floor"]["validation_accuracy"] == result["floor"]
        assert alone["final"]["step"] == (8 if name in going else 4)
    told = capsys.readouterr().out
    assert "stopped early" in told and "expected best of 1: " in told and "without learning" in told
    with viewer.linked(viewer.boards_of([str(tmp_path / "sweep")])) as folder:
        rows = session_groups(browser(folder))
    shown = {row["name"].rpartition("-")[2]: row["metricValues"][0]["value"] for row in rows}
    assert shown == {name: pytest.approx(score) for name, score in scores.items()}
    assert {row["hparams"]["run.seed"] for row in rows} == {1, 2}
    with pytest.raises(UserError, match="holds another sweep"):
        sweep.main(arguments(config, tmp_path / "sweep", *SHORT, seeds_weights=3))


def test_the_seed_of_the_weights_leaves_the_order_and_the_other_way_round(tmp_path: Path, tiny_data: Path) -> None:
    def run(*overrides: str) -> tuple[list[str], dict[str, Any]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        config = tiny.write_config(folder, "classification", tiny.bert(tiny_data), train=64)
        assert running.command("train", config, *SHORT, *overrides).code == 0
        hashes = [line["batch_hash"] for line in running.lines_of(folder / "run") if "batch_hash" in line]
        return hashes, running.tensors_of(folder / "run", 2 if "x" in overrides else 8)

    plain, weights, order = run("data.seed=1"), run("run.seed=2", "data.seed=1"), run("data.seed=2")
    assert plain[0] == weights[0] != order[0]


def test_a_mistake_is_told_before_the_first_run(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.write_config(tmp_path, "classification", tiny.bert(tiny_data), train=64)
    runner = Runner(monkeypatch)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        sweep.main(arguments(config, tmp_path / "sweep", search=["optimizer.learning_rate=1e-3,-1"]))
    assert runner.started == []
