"""Fetches what will be read before it is read, in background threads.

The order is known, so this is no guess: a stream says which chunks its next samples need, in the order of first use, as
soon as the samples are located. Threads, since all of the work (network, hash, disk) lets go of the interpreter's lock.
What is fetched lies in the cache on the disk, not in memory; here are only numbers of chunks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol


class Fetched(Protocol):
    """A source whose chunks are fetched."""

    @property
    def chunk_bytes(self) -> int:
        """Of one."""

    def fetch_ahead(self, chunk: int) -> None:
        """Have the chunk in the cache. Raises whatever keeps it from there."""


Job = tuple[Fetched, int]


class Ahead:
    """At most `workers` fetches at a time, and at most `most_bytes` fetched that are not yet read (but one in any case):
    more would push out of the cache what is read before it.

    `close` when done; a fetch that is under way then ends by itself.
    """

    def __init__(self, workers: int, most_bytes: int) -> None:
        self.workers, self.most_bytes = workers, most_bytes
        self._lock = threading.Lock()
        self._room, self._done = threading.Condition(self._lock), threading.Condition(self._lock)
        # Each job -> the number of the call of `expect` that asked for it last.
        self._waiting: OrderedDict[Job, int] = OrderedDict()
        self._running: dict[Job, int] = {}
        self._ready: dict[Job, int] = {}
        self._failed: dict[Job, BaseException] = {}
        self._held = 0  # bytes of what is running or ready
        self._call = self._threads = 0
        self._closed = False

    def expect(self, jobs: Iterable[Job]) -> None:
        """These will be read next, behind those of the last call. What was expected by calls before that is over."""
        wanted = list(jobs)
        with self._lock:
            self._call += 1
            self._forget_before(self._call - 1)
            for job in wanted:
                known = next((group for group in (self._running, self._ready) if job in group), self._waiting)
                known[job] = self._call
            while self._threads < min(self.workers, len(self._waiting)):
                self._threads += 1
                threading.Thread(target=self._work, name="fetch ahead", daemon=True).start()
            self._room.notify_all()

    def wait(self, job: Job) -> None:
        """Return when the job is not under way (any more). Raises what kept it from being done."""
        with self._lock:
            self._waiting.pop(job, None)  # whoever waits fetches it himself at once
            self._done.wait_for(lambda: job not in self._running)
            if (error := self._failed.pop(job, None)) is not None:
                raise error

    def read(self, job: Job) -> None:
        """The job's chunk has been read: there is room for another."""
        with self._lock:
            if self._ready.pop(job, None) is not None:
                self._free(job)

    def close(self) -> None:
        """No more is fetched."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            self._room.notify_all()

    def _forget_before(self, call: int) -> None:
        for job in [job for job, asked in self._waiting.items() if asked < call]:
            del self._waiting[job]
        for job in [job for job, asked in self._ready.items() if asked < call]:
            del self._ready[job]
            self._free(job)

    def _free(self, job: Job) -> None:
        self._held -= job[0].chunk_bytes
        self._room.notify()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            failed: BaseException | None = None
            try:
                job[0].fetch_ahead(job[1])
            except BaseException as error:  # whatever it is belongs to who will read the chunk
                failed = error
            with self._lock:
                call = self._running.pop(job)
                if failed is None and call >= self._call - 1:
                    self._ready[job] = call
                else:
                    self._free(job)
                if failed is not None:
                    self._failed[job] = failed
                self._done.notify_all()

    def _next(self) -> Job | None:
        """The next job; None when there will be none."""
        with self._lock:
            self._room.wait_for(lambda: self._closed or self._may_start())
            if self._closed:
                return None
            job, call = self._waiting.popitem(last=False)
            self._running[job] = call
            self._failed.pop(job, None)  # of a try before
            self._held += job[0].chunk_bytes
            if self._may_start():
                self._room.notify()
            return job

    def _may_start(self) -> bool:
        if not self._waiting:
            return False
        return self._held == 0 or self._held + next(iter(self._waiting))[0].chunk_bytes <= self.most_bytes
