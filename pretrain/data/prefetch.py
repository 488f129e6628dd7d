"""Read ahead of the training loop, in one thread.

A thread, not worker processes: passing a batch between processes costs 1.4 ms, and reading and hashing let go of the
interpreter's lock. Nothing of it is state: the plan says which sample numbers each step takes, wherever it begins.

A thread cannot be killed by itself, but what it reads from may stop answering: a disk, a server, a mount. So the loop waits
for a batch no longer than a limit, and the thread keeps in one place what it reads (`Reading`), for the message.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pretrain.data.order import rank_numbers
from pretrain.errors import Unfit, UserError

if TYPE_CHECKING:
    from pretrain.data.stream import Also, Stream
    from pretrain.finetuning.examples import ExampleStream

Batch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # numbers (B,), tokens (B, T + 1), both int64
# Batches, the numbers to be read for each, and the sources and samples of all of these.
Located = tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]], np.ndarray[Any, Any], np.ndarray[Any, Any]]
Item = tuple[Batch | None, BaseException | None]
ASK_SECONDS = 0.5  # whether a read hangs
LOCATE = 2048  # sample numbers located in one call: 0.4 us each, where a batch of 8 by itself costs 30 us each
LOOKS = 10  # in which the limit is waited: a process that was suspended loses one of them, not all its time
LEAVE = 10.0  # seconds that a thread has for the read that it is in, when it is to end


class NoBatch(Unfit):
    """None came within the time limit: what is read from does not answer."""


class Prefetch:
    """An iterator over the batches of a pipeline that runs in a thread, at most `depth` batches ahead.

    An exception of the thread is raised where its batch would have been. `close` (or leaving `with`) ends the thread.
    doing: what the thread does now, in words. limit: seconds that `next` waits at most, and raises NoBatch then; or sooner,
    where `stalled`, which it asks meanwhile, has something to say.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        depth: int,
        doing: Callable[[], str] = str,
        limit: float | None = None,
        stalled: Callable[[], str] | None = None,
    ) -> None:
        if depth < 1:
            raise ValueError(f"the prefetch depth must be at least 1, not {depth}")
        self._ready: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._done = False
        self._doing, self._limit, self._stalled = doing, limit, stalled
        self._waits = self._held = False
        # The thread holds the queue but not this object, so an iterator that is dropped without `close` ends it too.
        arguments = (batches, self._ready, self._slots, self._stop)
        self._thread = threading.Thread(target=_work, args=arguments, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._done:
            raise StopIteration
        batch, error = self._next()
        self._slots.release()
        if batch is not None:
            return batch
        self._done = True
        self._thread.join()
        raise error if error is not None else StopIteration

    def waits_for(self) -> str:
        """What `next` waits for now, in words; empty where nobody waits."""
        return self._doing() if self._waits else ""

    def _next(self) -> Item:
        self._waits = True
        try:
            return self._within_limits()
        finally:
            self._waits = False

    def _within_limits(self) -> Item:
        """The next item. Waited for in turns, so that a process that was suspended loses one of them, not all its time."""
        if self._limit is None and self._stalled is None:
            return self._ready.get()
        ask = math.inf if self._stalled is None else ASK_SECONDS
        turn = min(ask, math.inf if self._limit is None else self._limit / LOOKS)
        for number in itertools.count(1):
            with contextlib.suppress(queue.Empty):
                return self._ready.get(timeout=turn)
            if self._stalled is not None and (told := self._stalled()):
                self._give_up(f"{told} ({self._doing()})")
            if self._limit is not None and number * turn >= self._limit * (1 - 1e-9):
                mend = "Look after the disk or server that holds it; then the same command goes on."
                self._give_up(f"No batch came for {self._limit:g} s: {self._doing()}. {mend}")
        raise AssertionError

    def _give_up(self, why: str) -> NoReturn:
        self._done = self._held = True
        raise NoBatch(why)

    def close(self) -> None:
        """End the thread; batches not yet taken are dropped. One that is held by its read is left behind."""
        self._done = True
        self._stop.set()
        self._slots.release()
        if self._thread is not threading.current_thread() and not self._held:
            self._thread.join(LEAVE)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self._stop.set()
            self._slots.release()


def _work(
    batches: Iterable[Batch], ready: queue.SimpleQueue[Item], slots: threading.Semaphore, stop: threading.Event
) -> None:
    try:
        iterator = iter(batches)
        while True:
            slots.acquire()
            if stop.is_set():
                return
            batch = next(iterator, None)
            ready.put((batch, None))
            if batch is None:
                return
    except BaseException as error:  # whatever it is belongs to the loop that waits for this batch
        ready.put((None, error))


class Reading:
    """Reads samples of a stream, and says which, also while it is held there and from another thread."""

    def __init__(self, stream: Stream | ExampleStream) -> None:
        self.stream = stream
        self.now: tuple[float, np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None

    def __call__(
        self, numbers: np.ndarray[Any, Any], sources: np.ndarray[Any, Any], samples: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """`stream.gather` of samples (B,). An error of the program has a note that says at which."""
        self.stream.row = 0
        self.now = time.monotonic(), numbers, sources, samples
        try:
            return self.stream.gather(sources, samples, numbers)
        except UserError:  # says it itself
            raise
        except Exception as error:
            error.add_note(str(self))
            raise
        finally:
            self.now = None

    def __str__(self) -> str:
        """`the reader is at sample 1,234, in shards/train/shard-00003.tar, chunk 17, and has been at its batch for 12 s`"""
        now = self.now
        if now is None:
            return "the reader is not reading"
        since, numbers, sources, samples = now
        row = min(self.stream.row, len(numbers) - 1)  # which the thread may have set for its next batch
        return (
            f"the reader is at sample {int(numbers[row]):,}, in {self.stream.where(int(sources[row]), int(samples[row]))}, "
            f"and has been at its batch for {time.monotonic() - since:.0f} s"
        )


def prefetch(
    stream: Stream | ExampleStream,
    plan: Iterator[tuple[int, int]],
    rank: int,
    world: int,
    depth: int = 2,
    also: Also | None = None,
    limit: float | None = None,
    timeout: float | None = None,
) -> Prefetch:
    """Batches of one data-parallel rank: for each (first sample number, global batch size) of the plan, its numbers
    (B,) and tokens (B, T + 1), behind which are those of the samples that `also` names (`Stream.read`).

    limit: seconds to wait for a batch, see `Prefetch`; timeout: for one read that hangs. None: for ever."""
    from webdataset.pipeline import DataPipeline

    reading = Reading(stream)

    def positions() -> Iterator[tuple[int, int]]:
        return plan

    def numbers(source: Iterator[tuple[int, int]]) -> Iterator[np.ndarray[Any, Any]]:
        for first, size in source:
            yield rank_numbers(first, size, rank, world, stream.lanes)

    def located(source: Iterator[list[np.ndarray[Any, Any]]]) -> Iterator[Located]:
        for batches in source:
            wanted = batches if also is None else [np.concatenate([mine, also(mine)]) for mine in batches]
            sources, samples = stream.order.locate(np.concatenate(wanted))
            stream.expect(sources, samples)
            yield batches, wanted, sources, samples

    def tokens(source: Iterator[Located]) -> Iterator[Batch]:
        for batches, wanted, sources, samples in source:
            ends = np.cumsum([len(numbers) for numbers in wanted])
            for mine, numbers, end in zip(batches, wanted, ends, strict=True):
                part = slice(end - len(numbers), end)
                rows = reading(numbers, sources[part], samples[part])
                yield mine, rows if also is None else np.hstack(np.split(rows, len(numbers) // len(mine)))

    stages: list[Callable[..., Iterator[Any]]] = [positions, numbers, _groups, located, _one_ahead, tokens]
    stalled = None if timeout is None else partial(stream.stalled, timeout)
    return Prefetch(DataPipeline(*stages), depth, reading.__str__, limit, stalled)


def _one_ahead(groups: Iterator[Located]) -> Iterator[Located]:
    """The same, each held back until the one behind it is known: what is expected is never less than a group. What came
    before an error of the plan is still given."""
    held: Located | None = None
    try:
        for group in groups:
            if held is not None:
                yield held
            held = group
    except Exception:
        if held is not None:
            yield held
        raise
    if held is not None:
        yield held


def _groups(batches: Iterator[np.ndarray[Any, Any]]) -> Iterator[list[np.ndarray[Any, Any]]]:
    """Batches together until they hold LOCATE numbers; what came before an error of the plan is still given."""
    group: list[np.ndarray[Any, Any]] = []
    try:
        for batch in batches:
            group.append(batch)
            if sum(map(len, group)) >= LOCATE:
                yield group
                group = []
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group
