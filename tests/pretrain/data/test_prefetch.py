"""The thread that reads ahead: order, errors, its end, and that it is webdataset's pipeline."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from pretrain.data import prefetch as module
from pretrain.data.order import rank_numbers
from pretrain.data.prefetch import LOCATE, Prefetch, prefetch
from pretrain.data.stream import Stream, batch_hash
from pretrain.errors import UserError

Plan = list[tuple[int, int]]
RAMP: Plan = [(0, 4), (4, 4), (8, 12), (20, 12), (64, 8)]  # batches grow, then numbers are skipped


@pytest.fixture
def stream(source: Path) -> Stream:
    return Stream([source], 16, seed=1, lanes=8)


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 4)])
def test_batches_are_the_plans_in_order_at_any_depth(stream: Stream, depth: int, rank: int, world: int) -> None:
    with prefetch(stream, iter(RAMP), rank, world, depth) as batches:
        found = list(batches)
    assert len(found) == len(RAMP)
    for (first, size), (numbers, tokens) in zip(RAMP, found, strict=True):
        assert numbers.tolist() == rank_numbers(first, size, rank, world, stream.lanes).tolist()
        assert np.array_equal(tokens, stream.read(numbers))
        assert tokens.dtype == np.int64


@pytest.mark.parametrize("size", [8, LOCATE // 2, LOCATE + 24])
def test_batches_are_the_same_whether_located_together_or_alone(stream: Stream, size: int) -> None:
    steps = 2 * LOCATE // size + 2
    with prefetch(stream, ((step * size, size) for step in range(steps)), 0, 1) as batches:
        for step, (numbers, tokens) in enumerate(batches):
            expected = rank_numbers(step * size, size, 0, 1, stream.lanes)
            assert numbers.tolist() == expected.tolist()
            assert np.array_equal(tokens, stream.read(expected))
    assert step == steps - 1


def test_a_restart_at_any_step_and_world_size_gives_the_same_batches(stream: Stream) -> None:
    plan = [(12 * step, 12) for step in range(8)]

    def hashes(plan: Plan, world: int) -> list[int]:
        """Of each step's global batch."""
        ranks = []
        for rank in range(world):
            with prefetch(stream, iter(plan), rank, world) as batches:
                ranks.append([batch_hash(*batch) for batch in batches])
        return [int(np.sum(np.array(step, np.int64))) for step in zip(*ranks, strict=True)]

    expected = hashes(plan, 1)
    for stop, world in ((0, 2), (3, 4), (7, 12)):
        assert hashes(plan[:stop], 3) + hashes(plan[stop:], world) == expected if stop else hashes(plan, world)


def test_it_is_a_webdataset_pipeline_that_takes_stock_stages(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(module, "Prefetch", lambda batches, *_: taken.append(batches))
    prefetch(stream, iter(RAMP), 0, 1)
    pipeline = taken[0]
    assert isinstance(pipeline, webdataset.DataPipeline)
    last = pipeline.compose(webdataset.map(lambda batch: batch[1][:, -1])).compose(webdataset.slice(1, 3))
    expected = [stream.read(rank_numbers(*step, 0, 1, stream.lanes))[:, -1].tolist() for step in RAMP[1:3]]
    assert [tokens.tolist() for tokens in last] == expected


def test_an_error_of_the_plan_comes_at_its_own_batch(stream: Stream) -> None:
    def plan() -> Iterator[tuple[int, int]]:
        yield from RAMP[:3]
        raise RuntimeError("the schedule broke")

    with prefetch(stream, plan(), 0, 1, depth=8) as batches:
        assert [len(next(batches)[0]) for _ in range(3)] == [4, 4, 12]
        with pytest.raises(RuntimeError, match="the schedule broke"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


def test_a_batch_that_ranks_cannot_share_fails_at_its_own_step(stream: Stream) -> None:
    with prefetch(stream, iter([(0, 4), (4, 3), (7, 4)]), 0, 2, depth=8) as batches:
        assert len(next(batches)[0]) == 2
        with pytest.raises(ValueError, match="a batch of 3 sequences"):
            next(batches)


def test_a_damaged_chunk_fails_at_the_batch_that_needs_it(source: Path) -> None:
    stream = Stream([source], 16, seed=1, shuffle=False)
    shard = source / "shard-00001.tar"  # chunks 4 to 7
    data = bytearray(shard.read_bytes())
    data[512] ^= 1
    shard.write_bytes(data)
    with prefetch(stream, ((4 * step, 4) for step in range(10)), 0, 1, depth=8) as batches:
        found = [next(batches) for _ in range(4)]  # a chunk has four sequences
        with pytest.raises(UserError, match=r"shard-00001.tar, chunk 4: its bytes were altered"):
            next(batches)
    assert [numbers.tolist() for numbers, _ in found] == [list(range(4 * step, 4 * step + 4)) for step in range(4)]


def test_it_reads_at_most_depth_batches_ahead() -> None:
    made: list[int] = []
    enough = threading.Event()

    def batches() -> Iterator[Any]:
        for number in itertools.count():
            made.append(number)
            if number == 4:
                enough.set()
            yield np.array([number]), np.zeros((1, 2))

    with Prefetch(batches(), depth=3) as source:
        assert [int(next(source)[0][0]) for _ in range(2)] == [0, 1]
        assert enough.wait(10)  # two taken and three ready; a sixth waits for a place
    assert made == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_ends_the_thread_at_any_moment(stream: Stream, taken: int) -> None:
    before = threads()
    batches = prefetch(stream, ((8 * step, 8) for step in itertools.count()), 0, 1, depth=2)
    for _ in range(taken):
        next(batches)
    assert threads() == before + 1
    batches.close()
    batches.close()
    assert threads() == before
    with pytest.raises(StopIteration):
        next(batches)


def test_an_iterator_that_is_dropped_ends_its_thread(stream: Stream) -> None:
    batches = prefetch(stream, ((8 * step, 8) for step in itertools.count()), 0, 1)
    next(batches)
    thread = batches._thread
    del batches
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_finished_plan_ends_the_iteration_and_the_thread(stream: Stream) -> None:
    before = threads()
    batches = prefetch(stream, iter(RAMP[:1]), 0, 1)
    assert len(list(batches)) == 1
    assert threads() == before
    assert list(batches) == []


def test_a_depth_of_zero_is_refused(stream: Stream) -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        prefetch(stream, iter(RAMP), 0, 1, depth=0)
