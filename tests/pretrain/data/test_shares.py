"""Shares that change: the closed form against a walk that counts, and what holds for every lane on both sides of a border."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import order as orders
from pretrain.data.order import Order, Source
from pretrain.data.shares import PERIOD, Integers, Stretch, round_robin, slots_of
from tests.pretrain.data import reference
from tests.pretrain.data.reference import Counting
from tests.pretrain.data.test_order import cost

FEW = settings(max_examples=12, deadline=None)
SOURCES = [Source(5000, 16), Source(90, 7), Source(3, 4), Source(1777, 32)]
TEN_TRILLION = Source(10**13 // 4096 // 4, 128)
# Where shares change, and weights from there on; a source may have none for a while.
BORDERS: list[tuple[int, list[float]]] = [
    (0, [4, 2.5, 1, 0.25]),
    (1234, [0, 1, 0, 1]),
    (1300, [1, 1, 1, 1]),
    (5000, [9, 1, 0, 3]),
]
# Of BORDERS with 64 lanes, from a sample number on: sources and samples. Were these to change, no older run could go on.
GOLDEN: dict[int, tuple[list[int], list[int]]] = {
    1228: ([0, 2, 0, 0, 1, 1, 3, 3, 1, 1, 1, 1], [488, 2, 4241, 2112, 17, 40, 1212, 718, 59, 16, 44, 83]),
    5000: ([0] * 12, [1901, 181, 2378, 3372, 4738, 4518, 4724, 444, 1955, 156, 4326, 3712]),
    10**9: ([3, 0, 3, 0, 0, 0, 0, 3, 0, 0, 0, 0], [908, 979, 1393, 2594, 168, 959, 1997, 203, 868, 1501, 259, 579]),
}


def mixed(
    borders: list[tuple[int, list[float]]], lanes: int, sources: list[Source] = SOURCES, seed: int = 99, window: int = 3
) -> Order:
    """Each stretch's base is what its predecessors have visited."""
    stretches: list[Stretch] = []
    base: Integers = np.zeros((lanes, len(sources)), np.int64)
    for first, weights in borders:
        if stretches:
            base = Order(sources, seed, lanes=lanes, window=window, stretches=stretches).visits(first)
        stretches.append(Stretch(first, slots_of(weights), base))
    return Order(sources, seed, lanes=lanes, window=window, stretches=stretches)


def counting(borders: list[tuple[int, list[float]]], lanes: int, sources: list[Source] = SOURCES) -> Counting:
    return Counting(sources, 99, [(first, slots_of(weights)) for first, weights in borders], lanes, 3)


def test_an_order_whose_shares_change_gives_the_golden_values() -> None:
    order = mixed(BORDERS, 64)
    for first, (sources, samples) in GOLDEN.items():
        found = order.locate(np.arange(first, first + len(samples)))
        assert (found[0].tolist(), found[1].tolist()) == (sources, samples)


@FEW
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)), max_size=3
    ),
    st.sampled_from([1, 5, 12, 256]),
)
def test_the_closed_form_is_what_a_walk_counts(changes: list[tuple[int, list[int]]], lanes: int) -> None:
    borders, first = [(0, [4.0, 2.5, 1.0, 0.25])], 0
    for length, weights in changes:
        first += length
        borders.append((first, [float(weight) for weight in weights]))
    order, slow, end = mixed(borders, lanes), counting(borders, lanes), first + 300
    sources, samples = order.locate(np.arange(end))
    assert list(zip(sources.tolist(), samples.tolist(), strict=True)) == list(slow.walk(end))
    assert order.visits(end).tolist() == slow.counts


def test_shares_that_never_change_are_the_order_of_a_mixture_with_weights() -> None:
    """So that a list of folders and named sources differ in their names alone."""
    numbers = np.concatenate([np.arange(5000), np.arange(10**9, 10**9 + 5000)])
    named, listed = mixed([(0, [4, 2.5, 1, 0.25])], 64), Order(SOURCES, 99, [4, 2.5, 1, 0.25], 64, 3)
    for one, other in zip(named.locate(numbers), listed.locate(numbers), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("lanes", [1, 12, 256])
def test_visits_before_a_number_are_those_of_all_numbers_before_it(lanes: int) -> None:
    order = mixed(BORDERS, lanes)
    sources = order.locate(np.arange(6000))[0]
    for number in (0, 1, 1233, 1234, 1235, 1300, 4999, 5000, 5001, 6000):
        expected = np.zeros((lanes, 4), np.int64)
        np.add.at(expected, (np.arange(number) % lanes, sources[:number]), 1)
        assert np.array_equal(order.visits(number), expected), number


def test_a_change_comes_at_just_its_sample_number_and_changes_nothing_before_it() -> None:
    order, before = mixed(BORDERS, 64), mixed(BORDERS[:1], 64)
    numbers = np.arange(1300)
    sources, samples = order.locate(numbers)
    assert np.array_equal(sources[:1234], before.locate(numbers[:1234])[0])
    assert np.array_equal(samples[:1234], before.locate(numbers[:1234])[1])
    assert set(sources[1234:]) == {1, 3}, "the others have no weight there"


def test_across_every_change_a_lane_reads_each_sequence_once_before_any_twice() -> None:
    """So no change repeats or leaves out what a source has, whatever its share was."""
    lanes = 16
    order = mixed([(0, [3, 1, 1, 1]), (2048, [1, 3, 0, 1]), (2100, [1, 0, 1, 3]), (9000, [1, 1, 1, 1])], lanes)
    sources, samples = order.locate(np.arange(24000))
    for index, source in enumerate(SOURCES):
        if source.samples < lanes:
            continue
        visits = [samples[lane::lanes][sources[lane::lanes] == index] for lane in range(lanes)]
        lengths = [len(range(lane, source.samples, lanes)) for lane in range(lanes)]
        epochs = min(len(mine) // length for mine, length in zip(visits, lengths, strict=True))
        assert epochs >= 1
        for epoch in range(epochs + 1):
            part = np.concatenate(
                [mine[epoch * length : (epoch + 1) * length] for mine, length in zip(visits, lengths, strict=True)]
            )
            assert len(np.unique(part)) == len(part)
            assert epoch == epochs or len(part) == source.samples


def test_shares_are_exact_over_whole_periods_of_each_stretch() -> None:
    lanes = 8
    first = 3 * PERIOD * lanes
    order = mixed([(0, [5, 3, 2, 1]), (first, [1, 1, 7, 2])], lanes)
    for begin, weights in ((0, [5, 3, 2, 1]), (first, [1, 1, 7, 2])):
        sources = order.locate(np.arange(begin, begin + 2 * PERIOD * lanes))[0].reshape(2, PERIOD, lanes)
        for index, count in enumerate(reference.shares(weights)):
            assert np.all(np.sum(sources == index, axis=1) == count)
            assert abs(count / PERIOD - weights[index] / sum(weights)) < 1 / PERIOD


def test_batches_vary_less_than_drawn_ones_behind_a_change_too() -> None:
    order = mixed([(0, [5, 3, 2, 1]), (777, [2, 2, 1, 5])], 64)
    batches = order.locate(np.arange(777, 777 + 512 * 300))[0].reshape(300, 512)
    for index, share in enumerate((0.2, 0.2, 0.1, 0.5)):
        assert np.mean(batches == index) == pytest.approx(share, abs=2e-3)
        assert np.std(np.sum(batches == index, axis=1)) < 0.7 * np.sqrt(512 * share * (1 - share))


@FEW
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.integers(12, PERIOD))
def test_slots_are_a_whole_number_next_to_the_share(weights: list[float], slots: int) -> None:
    found = slots_of(weights, slots)
    assert sum(found) == slots
    for count, weight in zip(found, weights, strict=True):
        assert abs(count - weight / sum(weights) * slots) < 1 + 1e-9


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.3, 0.2], [1, 0, 3], [4.0, 2.5, 1.0, 0.25]])
def test_the_round_robin_is_the_reference(weights: list[float]) -> None:
    slots = slots_of(weights)
    assert list(slots) == reference.shares(weights)
    taken, before = round_robin(slots)
    assert taken.tolist() == reference.round_robin(slots)
    assert before[:, -1].tolist() == list(slots)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_across_a_change_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    order, size = mixed(BORDERS, 16), 24
    for first in range(1200, 1320, size):
        parts = [orders.rank_numbers(first, size, rank, world, order.lanes) for rank in range(world)]
        found = np.concatenate([np.stack(order.locate(part)) for part in parts], axis=1)
        whole = np.stack(order.locate(orders.rank_numbers(first, size, 0, 1, order.lanes)))
        assert np.array_equal(found, whole)


def test_a_position_costs_the_same_at_ten_and_at_ten_billion_whatever_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    tracemalloc.start()
    order = mixed([(0, [1, 2, 3, 4]), (10**6, [4, 3, 2, 1]), (10**9, [1, 1, 1, 1])], 256, [TEN_TRILLION] * 4)
    work, memory = zip(*(cost(order, first, monkeypatch) for first in (10, 10**10)), strict=True)
    tracemalloc.stop()
    assert max(memory) < 1 << 20, "no table of the data's size"
    assert max(work) < 1.25 * min(work)
