"""Every pair of layout, micro-batch, recomputation, model and precision against one process (P1)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.matrix import AXES, MOST_PROCESSES, SEED, Combination, Matrix, accepted, covering, each_layout, write_shards

STEPS = 5  # past the step at which the batch ramp grows
MORE = 2  # drawn from all that remain


def combinations() -> list[Any]:
    """Those of few processes first in which each value stands once; the rest, in which each pair does, are thorough."""
    chosen = covering()
    rest = [combination for combination in each_layout() if combination not in chosen]
    seen: set[tuple[int, str]] = set()
    singles = set()
    for combination in sorted(chosen, key=lambda combination: combination.cost):
        values = set(enumerate(combination.values))
        if values - seen:
            seen |= values
            singles.add(combination)
    every = [*chosen, *random.Random(SEED).sample(rest, MORE)]
    return [pytest.param(one, marks=() if one in singles else pytest.mark.thorough) for one in every]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("matrix")
    write_shards(folder / "shards")
    return Matrix(folder, STEPS)


@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_every_pair_of_axes_trains_as_one_process(matrix: Matrix, combination: Combination) -> None:
    found = matrix.compare(combination)
    assert found.same, f"{found.layout}: step {found.step}: {found.what} {found.parameters}"


@pytest.mark.thorough
def test_the_set_covers_every_pair_that_is_accepted() -> None:
    together = {pair for combination in covering() for pair in combination.pairs()}
    assert together == {pair for combination in accepted() for pair in combination.pairs()}
    for axis, values in enumerate(AXES.values()):
        assert {combination.values[axis] for combination in covering()} == set(values)


def test_the_matrix_holds_what_it_should() -> None:
    layouts = {combination.layout for combination in accepted()}
    assert any("tp=2,sp,cp=2,pp=2" in layout for layout in layouts)
    assert any("cp=2,dp=2" in layout and "zero=3" in layout for layout in layouts)
    assert not any("pp=" in layout and "zero=2" in layout for layout in layouts)
    assert MOST_PROCESSES == 8 and len(each_layout()) > 150


def test_the_data_has_uneven_targets(matrix: Matrix) -> None:
    """Else a mean over micro-batches would pass for the mean over targets."""
    import numpy as np

    from pretrain.data.stream import Stream

    stream = Stream([matrix.folder / "shards" / "train"], 32, seed=1)
    ends = (stream.read(np.arange(64))[:, :-1] == stream.eos).sum(axis=1)
    assert 0.2 < (ends > 0).mean() < 0.8
