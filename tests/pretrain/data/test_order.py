"""The order of samples: golden vectors, a slow reference, and what must hold for every size, seed and position."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import order as orders
from pretrain.data.order import PERIOD, Order, Sequential, Source, mix, permute
from tests.pretrain.data import reference
from tests.pretrain.data.reference import Reference

FEW = settings(max_examples=40, deadline=None)
TEN_TRILLION = Source(10**13 // 4096, 128)  # tokens, in sequences of 4096 and chunks of 2^19

# name: sources, weights, lanes, window
SHAPES: dict[str, tuple[list[Source], list[float] | None, int, int]] = {
    "all tail": ([Source(1000, 16)], None, 256, 16),
    "windows": ([Source(123457, 64)], None, 16, 4),
    "mixture": ([Source(50000, 64), Source(7001, 64), Source(10, 64)], [0.5, 0.3, 0.2], 64, 4),
}
# Seed 7, first number: sources and samples of the numbers from there on. Were these to change, no older run could go on.
GOLDEN: dict[str, dict[int, tuple[list[int], list[int]]]] = {
    "all tail": {
        0: ([0] * 16, [290, 494, 868, 659, 999, 87, 539, 760, 642, 218, 512, 933, 948, 979, 736, 946]),
        10**9: ([0] * 16, [977, 217, 712, 759, 481, 651, 469, 497, 57, 557, 747, 443, 655, 663, 911, 586]),
    },
    "windows": {
        0: ([0] * 12, [61565, 27235, 68269, 118063, 11834, 85374, 70750, 3944, 48658, 122628, 66531, 68413]),
        10**9: ([0] * 12, [117290, 102553, 81054, 64592, 6842, 106880, 79902, 75826, 42666, 69506, 97905, 80773]),
    },
    "mixture": {
        0: (
            [1, 0, 0, 0, 2, 0, 1, 1, 2, 0, 0, 0, 2, 0, 1, 1],
            [5785, 3939, 49389, 31343, 0, 4820, 349, 2295, 9, 33552, 24575, 13029, 0, 35494, 1992, 424],
        ),
        10**9: (
            [2, 0, 1, 0, 1, 0, 1, 1, 2, 1, 1, 0, 1, 0, 1, 1],
            [2, 5787, 6714, 18630, 4577, 40439, 3463, 327, 0, 3779, 692, 46763, 4161, 31266, 4425, 404],
        ),
    },
}


def make(shape: str, seed: int = 7) -> Order:
    sources, weights, lanes, window = SHAPES[shape]
    return Order(sources, seed, weights, lanes, window)


# -- the bijection ---------------------------------------------------------------------------------------------------


def test_mix_is_the_published_splitmix64() -> None:
    first_outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # of seed 1234567 (Vigna)
    states = (1234567 + np.arange(1, 4, dtype=np.uint64) * orders.GOLDEN).astype(np.uint64)
    assert mix(states).tolist() == first_outputs


def test_permute_gives_the_golden_values() -> None:
    assert permute(np.arange(10), 10, 0).tolist() == [8, 3, 7, 0, 1, 5, 2, 4, 6, 9]
    assert permute(np.arange(8), 1000, 12345).tolist() == [348, 979, 436, 790, 764, 255, 428, 58]
    large = permute([0, 1, 2**40, 10**15 - 1], 10**15, 2**64 - 1)
    assert large.tolist() == [66857791283032, 679003005237158, 744035392630747, 840250103248124]


@FEW
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_of_any_size_under_any_key(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, np.uint64(key))), np.arange(size))


@FEW
@given(st.integers(1, 2**52), st.integers(0, 2**64 - 1), st.data())
def test_permute_equals_the_reference_at_large_sizes(size: int, key: int, data: st.DataObject) -> None:
    x = data.draw(st.integers(0, size - 1))
    assert int(permute(x, size, np.uint64(key))) == reference.permute(x, size, key)


# -- the order as a whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_gives_the_golden_values(shape: str) -> None:
    order = make(shape)
    for first, (sources, samples) in GOLDEN[shape].items():
        found = order.locate(np.arange(first, first + len(samples)))
        assert (found[0].tolist(), found[1].tolist()) == (sources, samples)


@FEW
@given(
    st.integers(1, 4000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**63), st.data()
)
def test_the_order_of_one_source_equals_the_reference(
    samples: int, per_chunk: int, lanes: int, window: int, seed: int, data: st.DataObject
) -> None:
    order = Order([Source(samples, per_chunk)], seed, None, lanes, window)
    slow = Reference([(samples, per_chunk)], seed, [1], lanes, window)
    numbers = data.draw(st.lists(st.integers(0, 5 * samples) | st.integers(0, 10**12), min_size=1, max_size=20))
    assert order.locate(np.array(numbers))[1].tolist() == [slow.locate(number)[1] for number in numbers]


@pytest.mark.parametrize("lanes", [1, 12, 256])
def test_the_order_of_a_mixture_equals_the_reference(lanes: int) -> None:
    sources, weights = [Source(5000, 16), Source(90, 7), Source(3, 4), Source(1777, 32)], [4.0, 2.5, 1.0, 0.25]
    order, slow = Order(sources, 99, weights, lanes, 3), Reference(sources, 99, weights, lanes, 3)
    numbers = [*range(0, 3000, 29), *range(10**10, 10**10 + 3000, 31)]
    found = order.locate(np.array(numbers))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == [slow.locate(number) for number in numbers]


@FEW
@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**64))
def test_an_epoch_uses_each_sample_exactly_once(
    samples: int, per_chunk: int, lanes: int, window: int, seed: int
) -> None:
    order = Order([Source(samples, per_chunk)], seed, None, lanes, window)
    for epoch in (0, 1, 10**6):
        numbers = np.arange(epoch * samples, (epoch + 1) * samples)
        assert np.array_equal(np.sort(order.locate(numbers)[1]), np.arange(samples))


@pytest.mark.parametrize("samples", [123457, 131072, 65537])
def test_a_large_epoch_uses_each_sample_exactly_once(samples: int) -> None:
    order = Order([Source(samples, 64)], 3, None, 64, 4)
    assert np.array_equal(np.sort(order.locate(np.arange(2 * samples, 3 * samples))[1]), np.arange(samples))


@pytest.mark.parametrize("shape", ["all tail", "windows"])
def test_seeds_and_epochs_differ(shape: str) -> None:
    samples = SHAPES[shape][0][0].samples
    numbers = np.arange(samples)
    first = make(shape).locate(numbers)[1]
    for other in (make(shape).locate(numbers + samples)[1], make(shape, seed=8).locate(numbers)[1]):
        assert np.mean(first == other) < 5 / samples + 0.001  # chance: one place on the average


def test_an_order_does_not_depend_on_how_numbers_are_asked_for() -> None:
    order, numbers = make("mixture"), np.arange(5000, 7000)
    together = order.locate(numbers)
    backwards = [order.locate(np.array([number])) for number in numbers[::-1]]
    assert [int(sample[0]) for _, sample in backwards] == together[1][::-1].tolist()
    assert [int(source[0]) for source, _ in backwards] == together[0][::-1].tolist()


# -- how well it shuffles, and what it costs to read -----------------------------------------------------------------


@pytest.mark.parametrize("shape", ["all tail", "windows"])
def test_samples_move_as_far_as_in_a_true_shuffle(shape: str) -> None:
    samples = SHAPES[shape][0][0].samples
    found = make(shape).locate(np.arange(samples))[1]
    moved = np.mean(np.abs(found - np.arange(samples))) / samples
    assert moved == pytest.approx(1 / 3, abs=0.03)  # of two independent uniform places
    assert abs(np.corrcoef(found, np.arange(samples))[0, 1]) < 0.1


def test_neighbours_are_rarely_neighbours_again() -> None:
    found = make("windows").locate(np.arange(123457))[1]
    after_each_other = np.mean(np.diff(found) == 1)
    assert after_each_other < 3 / (16 * 4 * 64)  # as rare as in a flat shuffle of what is open at once, about
    assert np.mean(np.diff(found[::16]) == 1) < 3 / (4 * 64)  # inside one lane: of its window


def chunks_read(order: Order, source: Source) -> Any:
    """Chunk of each number of the first epoch that lies in windows."""
    body = source.samples // source.per_chunk // (order.lanes * order.window) * order.lanes * order.window
    return order.locate(np.arange(body * source.per_chunk))[1] // source.per_chunk


@pytest.mark.parametrize("world", [1, 2, 8, 16])
def test_each_chunk_is_read_by_one_rank_while_there_are_lanes_enough(world: int) -> None:
    source = Source(123457, 64)
    order = Order([source], 1, None, 16, 4)
    chunks = chunks_read(order, source)
    readers: dict[int, set[int]] = {}
    for first in range(0, len(chunks), 32):
        for rank in range(world):
            for number in orders.rank_numbers(first, 32, rank, world, order.lanes):
                readers.setdefault(int(chunks[number]), set()).add(rank)
    assert {len(ranks) for ranks in readers.values()} == {1}


def test_lanes_times_window_chunks_are_open_at_once_and_new_ones_come_evenly() -> None:
    source, lanes, window = Source(64 * 4096, 64), 64, 16
    chunks = chunks_read(Order([source], 1, None, lanes, window), source)
    _, begun = np.unique(chunks, return_index=True)
    ended = len(chunks) - np.unique(chunks[::-1], return_index=True)[1]
    steps = np.arange(0, len(chunks), lanes)
    num_open = np.searchsorted(np.sort(begun), steps, "right") - np.searchsorted(np.sort(ended), steps, "right")
    assert num_open.max() <= lanes * window
    by_chunk_time = np.bincount(begun // (lanes * source.per_chunk))  # `lanes` chunks' worth of samples each
    assert by_chunk_time[1:].max() <= 1.5 * lanes  # unstaggered windows: lanes x window at once, then none


# -- mixtures --------------------------------------------------------------------------------------------------------


def test_shares_of_a_mixture_are_exact_over_each_period() -> None:
    order = make("mixture")
    sources = order.locate(np.arange(3 * PERIOD * order.lanes))[0].reshape(3, PERIOD, order.lanes)
    exact = reference.shares([0.5, 0.3, 0.2])
    assert sum(exact) == PERIOD and np.all(np.abs(np.array(exact) - np.array([0.5, 0.3, 0.2]) * PERIOD) < 1)
    for index, count in enumerate(exact):
        assert np.all(np.sum(sources == index, axis=1) == count)  # in each period of each lane


def test_batches_of_a_mixture_vary_less_than_drawn_ones() -> None:
    batches = make("mixture").locate(np.arange(512 * 400))[0].reshape(400, 512)
    for index, share in enumerate((0.5, 0.3, 0.2)):
        assert np.std(np.sum(batches == index, axis=1)) < 0.7 * np.sqrt(512 * share * (1 - share))


@pytest.mark.parametrize("samples", [[5000, 701], [64, 63], [300, 10]])
def test_each_lane_visits_all_its_samples_of_a_source_before_any_twice(samples: Sequence[int]) -> None:
    lanes = 64
    order = Order([Source(count, 16) for count in samples], 5, [3, 2], lanes, 2)
    sources, found = order.locate(np.arange(lanes * 1000))
    for index, count in enumerate(samples):
        visits = [found[lane::lanes][sources[lane::lanes] == index] for lane in range(lanes)]
        lengths = [len(range(lane % count, count, lanes)) for lane in range(lanes)]
        for round_ in range(min(len(visit) // length for visit, length in zip(visits, lengths, strict=True))):
            parts = [v[round_ * length : (round_ + 1) * length] for v, length in zip(visits, lengths, strict=True)]
            for block in range(0, lanes, count):  # of more lanes than samples, each block of lanes is an epoch
                together = np.concatenate(parts[block : block + count])
                assert len(np.unique(together)) == len(together)
                if block + count <= lanes or count >= lanes:
                    assert len(together) == count


# -- the same cost everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sources", "weights"), [([TEN_TRILLION], None), ([TEN_TRILLION] * 4, [1.0, 2.0, 3.0, 4.0])])
def test_a_position_costs_the_same_at_ten_and_at_ten_billion(
    sources: list[Source], weights: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracemalloc.start()
    order = Order(sources, 1, weights)
    work, memory = zip(*(cost(order, first, monkeypatch) for first in (10, 10**10)), strict=True)
    tracemalloc.stop()
    assert max(memory) < 1 << 20, "no table"
    assert max(work) < 1.25 * min(work)
    assert max(work) < 60 * 256, "some dozens of hashes a number"


def cost(order: Order, first: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Values hashed for 256 numbers, and bytes held at most."""
    hashed, original = 0, mix

    def counting(x: Any) -> Any:
        nonlocal hashed
        hashed += np.size(x)
        return original(x)

    with monkeypatch.context() as patch:
        patch.setattr(orders, "mix", counting)
        tracemalloc.reset_peak()
        order.locate(np.arange(first, first + 256))
    return hashed, tracemalloc.get_traced_memory()[1]


# -- ranks -----------------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 10**10), st.integers(1, 64))
def test_ranks_together_take_the_batch_in_one_order_whatever_their_number(
    share: int, world: int, first: int, lanes: int
) -> None:
    size = share * world
    numbers = [orders.rank_numbers(first, size, rank, world, lanes) for rank in range(world)]
    assert {len(part) for part in numbers} == {share}
    assert sorted(np.concatenate(numbers).tolist()) == list(range(first, first + size))
    assert np.concatenate(numbers).tolist() == sorted(range(first, first + size), key=lambda n: (n % lanes, n))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 20), st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_restart_with_another_world_size_goes_on_in_the_same_order(stop: int, before: int, after: int) -> None:
    order, size, steps = make("windows"), 12, 21

    def batches(first_step: int, last_step: int, world: int) -> list[int]:
        """What all ranks read, each locating its own numbers."""
        parts = (
            order.locate(orders.rank_numbers(step * size, size, rank, world, order.lanes))[1]
            for step in range(first_step, last_step)
            for rank in range(world)
        )
        return [sample for part in parts for sample in part.tolist()]

    assert batches(0, stop, before) + batches(stop, steps, after) == batches(0, steps, 1)


@pytest.mark.parametrize(("size", "rank", "world"), [(8, 0, 3), (0, 0, 1), (8, 2, 2), (8, -1, 2)])
def test_a_batch_that_cannot_be_shared_is_refused(size: int, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"a batch of {size} sequences cannot be shared by {world}"):
        orders.rank_numbers(0, size, rank, world, 4)


# -- validation's order, and mistakes --------------------------------------------------------------------------------


def test_sequential_gives_every_sample_as_it_lies() -> None:
    order = Sequential([Source(3, 2), Source(2, 2)])
    sources, samples = order.locate(np.arange(7))
    assert sources.tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert samples.tolist() == [0, 1, 2, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("sources", "options", "words"),
    [
        ([], {}, "at least one source"),
        ([Source(0, 1)], {}, "at least one sample"),
        ([Source(5, 1)], {"lanes": 0}, "lanes and window must be at least 1"),
        ([Source(5, 1)], {"window": 0}, "lanes and window must be at least 1"),
        ([Source(5, 1)] * 2, {"weights": [1.0]}, "one positive number for each source"),
        ([Source(5, 1)] * 2, {"weights": [1.0, float("nan")]}, "one positive number for each source"),
        ([Source(5, 1)] * 2, {"weights": [1.0, float("inf")]}, "one positive number for each source"),
        ([Source(5, 1)] * 2, {"weights": [1.0, 1e-6]}, "smallest weight is below 1/4096"),
    ],
)
def test_an_order_that_cannot_be_is_refused(sources: list[Source], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Order(sources, 1, **options)


def test_numbers_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="begin at 0"):
        make("windows").locate(np.array([-1]))
