"""The thread that reads ahead: order, errors, its end, and that it is webdataset's pipeline."""

from __future__ import annotations

import gc
import itertools
import os
import queue
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from pretrain.data import chunks
from pretrain.data import prefetch as module
from pretrain.data.order import rank_numbers
from pretrain.data.prefetch import LOCATE, LOOKS, NoBatch, Prefetch, prefetch
from pretrain.data.stream import Stream, batch_hash
from pretrain.errors import Exit, UserError

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


# -- a read that does not end ----------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """From the 17th sample's chunk on a read waits at an empty pipe, as at a disk that does not answer."""
    reads, writes = os.pipe()
    here, read = threading.Event(), os.preadv

    def preadv(file: int, buffers: Any, start: int) -> int:
        if not here.is_set() and "shard-00001.tar" in os.readlink(f"/proc/self/fd/{file}"):
            here.set()
            os.read(reads, 1)
        return read(file, buffers, start)

    monkeypatch.setattr(chunks.os, "preadv", preadv)
    yield here
    os.close(writes)  # which ends the read
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join(10)
            assert not thread.is_alive()
    os.close(reads)


def test_a_read_that_does_not_end_is_named_after_the_limit(source: Path, held: threading.Event) -> None:
    stream = Stream([source], 16, seed=1, shuffle=False)
    batches = prefetch(stream, ((6 * step, 6) for step in range(10)), 0, 1, limit=0.5)
    assert [len(next(batches)[0]) for _ in range(2)] == [6, 6] and batches.waits_for() == ""
    where = re.escape(f"the reader is at sample 16, in {source}/shard-00001.tar, chunk 4")
    told: list[str] = []
    looking = threading.Thread(target=lambda: told.extend([str(held.wait(10)), _once(batches.waits_for)]))
    looking.start()
    with pytest.raises(
        NoBatch, match=rf"^No batch came for 0.5 s: {where}, and has been at its batch for \d+ s\. "
    ) as found:
        next(batches)
    looking.join(10)
    assert re.match(where, told[1])
    assert found.value.exit_code == Exit.UNFIT
    batches.close()  # does not wait for the read
    with pytest.raises(StopIteration):
        next(batches)


def _once(words: Any) -> str:
    """What is said as soon as anything is."""
    while not (said := words()):
        threading.Event().wait(0.01)
    return str(said)


def test_a_process_that_was_suspended_is_not_taken_for_one_that_waited(stream: Stream) -> None:
    """It wakes with one of its waits over, whatever the clock says: only the last one is the limit."""
    batches = prefetch(stream, iter(RAMP), 0, 1, limit=LOOKS)
    ready, waits, comes = batches._ready, [], [LOOKS]

    class Slow:
        def get(self, timeout: float) -> Any:
            waits.append(timeout)
            if len(waits) < comes[0]:
                raise queue.Empty
            return ready.get()

    batches._ready = Slow()  # type: ignore[assignment]
    assert len(next(batches)[0]) == 4
    assert waits == [1.0] * LOOKS
    comes[0] += LOOKS + 1  # one later than the limit
    with pytest.raises(NoBatch, match="No batch came for 10 s"):
        next(batches)
    batches.close()


def test_an_error_of_the_thread_says_for_which_sample_it_was(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream([source], 16, seed=1, shuffle=False)
    real = chunks.Chunks.tokens

    def tokens(self: chunks.Chunks, chunk: int, first: int, count: int) -> Any:
        return real(self, chunk, first, count) if chunk < 5 else 1 / 0

    monkeypatch.setattr(chunks.Chunks, "tokens", tokens)
    with prefetch(stream, ((6 * step, 6) for step in range(10)), 0, 1, depth=8) as batches:
        assert [len(next(batches)[0]) for _ in range(3)] == [6, 6, 6]
        with pytest.raises(ZeroDivisionError) as found:
            next(batches)
    [note] = found.value.__notes__
    assert re.match(rf"the reader is at sample 20, in {re.escape(str(source))}/shard-00001.tar, chunk 5, and has", note)
