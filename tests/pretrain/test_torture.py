"""A run killed again and again, each time started under another layout, equals one that was never interrupted (P2)."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from pretrain.errors import Exit
from tests.pretrain.deaths import ANY_TIME, KINDS, draw, processes
from tests.pretrain.kills import Death, Spot, arm
from tests.pretrain.running import command, steps_of
from tests.pretrain.torture import Torture


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("--first-seed")
        seeds = range(first, first + metafunc.config.getoption("--schedules"))
        metafunc.parametrize("seed", seeds, ids=lambda seed: f"seed {seed}")


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> Torture:
    return Torture(tmp_path_factory.mktemp("torture"))


@pytest.mark.slow
def test_a_run_that_dies_at_random_places_trains_as_one_that_does_not(torture: Torture, seed: int) -> None:
    torture.run(draw(seed))


def test_a_rank_that_was_not_asked_to_stop_ends_with_the_code_of_the_one_that_was(
    torture: Torture, tmp_path: Path
) -> None:
    """A launcher that looks at rank 0 alone must not take the run for finished."""
    asked = Death("stopped", Spot("optimizer step", count=2), rank=1, number=signal.SIGTERM)
    ran = command("train", torture.config(tmp_path, "dp=2"), fault=partial(arm, tmp_path, asked), world=2)
    assert ran.code == Exit.STOPPED and steps_of(tmp_path / "run") == [3], ran.told


@pytest.mark.parametrize("first", [0, 5, 100])
def test_five_schedules_hold_every_death_and_other_world_sizes(first: int) -> None:
    schedules = [draw(seed) for seed in range(first, first + 5)]
    kinds = {kind for schedule in schedules for kind in schedule.kinds}
    assert kinds == {*KINDS, ANY_TIME}
    resized = [schedule for schedule in schedules if len({processes(layout) for layout in schedule.layouts}) > 1]
    assert len(resized) >= 2
    assert any(len(set(schedule.layouts)) == 1 for schedule in schedules)
