"""Read ahead of the training loop, in one thread.

A thread, not worker processes: passing a batch between processes costs 1.4 ms, and reading and hashing let go of the
interpreter's lock. Nothing of it is state: the plan says which sample numbers each step takes, wherever it begins.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data.order import rank_numbers
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.stream import Also, Stream
    from pretrain.finetuning.examples import ExampleStream

Batch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # numbers (B,), tokens (B, T + 1), both int64
# Batches, the numbers to be read for each, and the sources and samples of all of these.
Located = tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]], np.ndarray[Any, Any], np.ndarray[Any, Any]]
Item = tuple[Batch | None, BaseException | None]
ASK_SECONDS = 0.5  # whether a read hangs
LOCATE = 2048  # sample numbers located in one call: 0.4 us each, where a batch of 8 by itself costs 30 us each


class Prefetch:
    """An iterator over the batches of a pipeline that runs in a thread, at most `depth` batches ahead.

    An exception of the thread is raised where its batch would have been. `close` (or leaving `with`) ends the thread.
    stalled: asked while a batch is waited for; what it says is raised as a UserError, and the thread, which nothing can end
    in a read that hangs, is left to itself.
    """

    def __init__(self, batches: Iterable[Batch], depth: int, stalled: Callable[[], str] | None = None) -> None:
        if depth < 1:
            raise ValueError(f"the prefetch depth must be at least 1, not {depth}")
        self._ready: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._done = self._hangs = False
        self._stalled = stalled
        # The thread holds the queue but not this object, so an iterator that is dropped without `close` ends it too.
        arguments = (batches, self._ready, self._slots, self._stop)
        self._thread = threading.Thread(target=_work, args=arguments, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._done:
            raise StopIteration
        batch, error = self._next_item()
        self._slots.release()
        if batch is not None:
            return batch
        self._done = True
        self._thread.join()
        raise error if error is not None else StopIteration

    def _next_item(self) -> Item:
        while True:
            try:
                return self._ready.get(timeout=None if self._stalled is None else ASK_SECONDS)
            except queue.Empty:
                if self._stalled is not None and (told := self._stalled()):
                    self._done = self._hangs = True
                    raise UserError(told) from None

    def close(self) -> None:
        """End the thread; batches not yet taken are dropped."""
        self._done = True
        self._stop.set()
        self._slots.release()
        if self._thread is not threading.current_thread() and not self._hangs:
            self._thread.join()

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


def prefetch(
    stream: Stream | ExampleStream,
    plan: Iterator[tuple[int, int]],
    rank: int,
    world: int,
    depth: int = 2,
    also: Also | None = None,
    timeout: float | None = None,
) -> Prefetch:
    """Batches of one data-parallel rank: for each (first sample number, global batch size) of the plan, its numbers
    (B,) and tokens (B, T + 1), behind which are those of the samples that `also` names (`Stream.read`).

    timeout: seconds after which a read that hangs ends the wait for its batch with a UserError; None: never."""
    from webdataset.pipeline import DataPipeline

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
                rows = stream.gather(sources[part], samples[part], numbers)
                yield mine, np.hstack(np.split(rows, len(numbers) // len(mine)))

    stages: list[Callable[..., Iterator[Any]]] = [positions, numbers, _groups, located, _one_ahead, tokens]
    stalled = None if timeout is None else partial(stream.stalled, timeout)
    return Prefetch(DataPipeline(*stages), depth, stalled)


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
