"""Relative biases in the Triton attention kernels, interpreted on the CPU, against the definition in float64."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.relative import t5_buckets
from tests.kernels import flash_cases as cases
from tests.kernels.flash_cases import Setting
from tests.kernels.test_flash import assert_right
from tests.kernels.workers import interpret

EDGES = tuple(t5_buckets(8, 20)[0].tolist())
LEFT = tuple(t5_buckets(8, 20, bidirectional=False)[0].tolist())

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "setting",
    [
        Setting(33, 33, edges=LEFT),
        Setting(40, 40, edges=EDGES, causal=False, batch=2),
        Setting(37, 37, edges=EDGES, window=9, causal=False),
        Setting(20, 37, edges=EDGES, causal=False, first_query=3),
        Setting(20, 50, edges=LEFT, first_query=25),
        Setting(40, 20, edges=EDGES, first_query=0, softcap=0.7),
        Setting(40, 40, edges=EDGES, causal=False, documents=(16, 17, 7)),
        Setting(20, 37, edges=LEFT, dropout=True, first_query=3, first_head=5),
        Setting(18, 18, edges=EDGES, causal=False, heads=4, groups=2, batch=2),
    ],
)
def test_a_relative_bias_and_its_gradient(setting: Setting, dtype: str) -> None:
    assert_right(setting._replace(dtype=dtype))


@pytest.mark.parametrize("edges", [(), (0,), (-500, -20, 3, 4, 9, 4000)])
def test_a_relative_bias_of_any_edges(edges: tuple[int, ...]) -> None:
    """One bucket; buckets of no distance that occurs; tiles far from the diagonal, in the first or last bucket alone."""
    assert_right(Setting(40, 56, heads=1, edges=edges, causal=False))


@pytest.mark.parametrize("tile", [(32, 32), (64, 64)])
@pytest.mark.parametrize("descriptors", [False, True])
def test_a_relative_bias_in_every_tile(tile: tuple[int, int], descriptors: bool) -> None:
    everything = {"window": 20, "documents": (1, 30, 9), "dropout": True, "softcap": 3.0, "edges": EDGES}
    assert_right(Setting(40, 40, tile=tile, descriptors=descriptors, causal=False, **everything))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_relative_bias_of_ragged_shapes(data: st.DataObject) -> None:
    """In float16 not the smallest: of few numbers the rounded output that delta comes from is all there is to an error."""
    dtype = data.draw(st.sampled_from(["float32", "float16"]))
    least = 1 if dtype == "float32" else 8
    assert_right(
        Setting(
            data.draw(st.integers(least, 40)),
            data.draw(st.integers(least, 40)),
            heads=data.draw(st.sampled_from([1, 2])),
            size=data.draw(st.integers(least, 40)),
            dtype=dtype,
            causal=data.draw(st.booleans()),
            window=data.draw(st.sampled_from([None, 1, 3, 17])),
            edges=tuple(sorted(data.draw(st.sets(st.integers(-40, 40), max_size=9)))),
            dropout=data.draw(st.booleans()),
            first_query=data.draw(st.integers(0, 20)),
            descriptors=data.draw(st.booleans()),
        )
    )


def test_the_gradient_of_a_bias_has_its_type() -> None:
    assert interpret(cases.bias_gradient_in, Setting(18, 18, edges=EDGES), "float16") == ("torch.float16", [])


def test_a_diagonal_of_tiles_that_sees_nothing_is_not_walked() -> None:
    """Of 5 x 5 tiles: below the diagonal and on it if causal; those that a window of 5 reaches; a query far behind."""
    assert interpret(cases.walked_diagonals, Setting(80, 80, edges=EDGES, causal=False)) == (-4, 9)
    assert interpret(cases.walked_diagonals, Setting(80, 80, edges=EDGES)) == (-4, 5)
    assert interpret(cases.walked_diagonals, Setting(80, 80, edges=EDGES, causal=False, window=5)) == (-1, 3)
    assert interpret(cases.walked_diagonals, Setting(16, 80, edges=EDGES, first_query=40)) == (0, 4)
    assert interpret(cases.walked_diagonals, Setting(16, 16, edges=EDGES, window=4, first_query=90))[1] == 0
