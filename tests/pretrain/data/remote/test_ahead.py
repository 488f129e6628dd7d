"""What is fetched before it is read: in order, few at a time, and errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pretrain.data.remote.ahead import Ahead


class Slow:
    """A source whose chunks come when they are let through."""

    chunk_bytes = 10

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.let_through = threading.Event()
        self.broken: set[int] = set()

    def fetch_ahead(self, chunk: int) -> None:
        self.begun.append(chunk)
        assert self.let_through.wait(10)
        if chunk in self.broken:
            raise RuntimeError(f"chunk {chunk} is broken")


@pytest.fixture
def slow() -> Iterator[Slow]:
    source = Slow()
    yield source
    source.let_through.set()


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_workers_bound_what_is_under_way_and_begin_with_the_first(slow: Slow) -> None:
    ahead = Ahead(3, 1000)
    ahead.expect([(slow, chunk) for chunk in range(8)])
    until(lambda: len(slow.begun) == 3)
    time.sleep(0.05)
    assert sorted(slow.begun) == [0, 1, 2]
    slow.let_through.set()
    until(lambda: len(slow.begun) == 8)
    assert slow.begun[3:] == sorted(slow.begun[3:])
    ahead.close()


def test_what_is_not_read_yet_is_bounded_in_bytes(slow: Slow) -> None:
    slow.let_through.set()
    ahead = Ahead(8, 35)
    ahead.expect([(slow, chunk) for chunk in range(8)])
    until(lambda: len(slow.begun) == 3)
    time.sleep(0.05)
    assert sorted(slow.begun) == [0, 1, 2]
    ahead.wait((slow, 1))
    ahead.read((slow, 1))
    until(lambda: len(slow.begun) == 4)
    ahead.close()


def test_one_is_fetched_however_large_it_is(slow: Slow) -> None:
    slow.let_through.set()
    ahead = Ahead(2, 1)
    ahead.expect([(slow, 0), (slow, 1)])
    until(lambda: slow.begun == [0])
    ahead.read((slow, 0))
    until(lambda: slow.begun == [0, 1])
    ahead.close()


def test_an_error_is_raised_to_who_waits_for_its_chunk_alone(slow: Slow) -> None:
    slow.broken = {1}
    slow.let_through.set()
    ahead = Ahead(1, 1000)
    ahead.expect([(slow, chunk) for chunk in range(3)])
    until(lambda: len(slow.begun) == 3)
    ahead.wait((slow, 0))
    ahead.wait((slow, 2))
    with pytest.raises(RuntimeError, match="chunk 1 is broken"):
        ahead.wait((slow, 1))
    ahead.wait((slow, 1))  # who tries again does so himself
    ahead.close()


def test_who_waits_for_one_that_is_under_way_gets_it_and_takes_one_that_is_not_himself(slow: Slow) -> None:
    ahead = Ahead(1, 1000)
    ahead.expect([(slow, 0), (slow, 1)])
    until(lambda: slow.begun == [0])
    ahead.wait((slow, 1))  # returns at once
    threading.Timer(0.1, slow.let_through.set).start()
    start = time.monotonic()
    ahead.wait((slow, 0))
    assert time.monotonic() - start > 0.05
    time.sleep(0.05)
    assert slow.begun == [0]  # 1 was left to who asked for it
    ahead.close()


def test_what_was_expected_two_calls_ago_holds_nothing_up(slow: Slow) -> None:
    """A run that goes back, or a reader that stopped, never reads it."""
    slow.let_through.set()
    ahead = Ahead(2, 20)
    ahead.expect([(slow, 0), (slow, 1), (slow, 2)])
    until(lambda: len(slow.begun) == 2)
    ahead.expect([(slow, 10)])
    ahead.expect([(slow, 20), (slow, 21)])
    until(lambda: 20 in slow.begun or 10 in slow.begun)
    until(lambda: len(slow.begun) == 4)
    assert 2 not in slow.begun
    ahead.close()


def test_threads_end_with_it(slow: Slow) -> None:
    def count() -> int:
        return sum(thread.name == "fetch ahead" for thread in threading.enumerate())

    before = count()
    ahead = Ahead(4, 1000)
    ahead.expect([(slow, chunk) for chunk in range(9)])
    until(lambda: count() == before + 4)
    slow.let_through.set()
    ahead.close()
    until(lambda: count() == before)
