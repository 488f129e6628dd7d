"""Writing checkpoints while the training goes on.

`Saver.save` stalls the run only while each rank copies its share to host memory; a thread then writes it. One checkpoint is
in flight at most: a save waits for the one before. On the disk it comes to be in this order, so that a process killed
anywhere leaves a whole checkpoint or none:

    each rank: its files, hashed and synced, in .step-00000500.partial/   (rank 0 made the folder)
    rank 0:    what was reported up to here; the manifest, synced; the folder's rename to step-00000500
    rank 0:    older checkpoints that need not be kept are renamed back to .partial and removed

The threads of the ranks talk over a group of their own, for the training uses the others at the same time.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from parallel.boxes import Box, HostMemory, held_boxes
from parallel.engine import Engine
from parallel.grid import Grid
from pretrain.checkpoint import list_steps
from pretrain.config.folder import CHECKPOINTS
from pretrain.opening import FORMAT, MANIFEST, State, folder_of
from pretrain.storage import Written, write_boxes

THREAD = "checkpoint"
PATIENCE = timedelta(days=1)  # for the slowest disk; a rank that dies or hangs is seen by the training


class Saved(NamedTuple):
    """A checkpoint that is on the disk."""

    step: int
    stall_seconds: float  # that the training stood still
    write_seconds: float  # from then until it was whole
    bytes: int  # of tensors, over all ranks
    unremoved: str  # why an older one could not be removed, or empty


class Unsaved(NamedTuple):
    """A checkpoint that a disk had no room for."""

    step: int
    error: str


class Order(NamedTuple):
    """What goes into a checkpoint beside the tensors, and what becomes of the others."""

    state: State
    about: dict[str, Any]
    keep_last: int
    keep: Callable[[int], bool]  # steps that are kept however old they are
    flush: Callable[[], None]  # brings to the disk, on rank 0, what was reported up to the step


class Saver:
    """Saves the checkpoints of one run, on every rank."""

    def __init__(self, run: Path, grid: Grid) -> None:
        self.run, self.grid = run, grid
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if grid.world > 1 else None
        self.host = HostMemory()
        self.step = 0  # of the last save
        self.writing: Future[None] | None = None
        self.ended: deque[Saved | Unsaved] = deque()  # not yet told of
        self.bytes = 0  # of this rank's share

    def save(self, order: Order, engine: Engine) -> None:
        """Copy the tensors and begin to write them, once the save before is done. Collective. Raises as `wait` does."""
        started = time.perf_counter()
        self.wait()
        self.step = order.state.step
        boxes = held_boxes(engine, self.grid, self.host)
        self.bytes = sum(box.values.nbytes for box in boxes)
        stall = time.perf_counter() - started
        self.writing = Future()
        # A daemon: a process that ends by an error must not wait here for ranks that wait for it.
        threading.Thread(target=self._write, args=(order, boxes, stall, self.writing), name=THREAD, daemon=True).start()

    @property
    def failed(self) -> bool:
        """The last save ended with an error, of which `wait` was not told yet."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self) -> None:
        """Until no save is in flight. One that a disk failed is `unsaved`, on every rank; raises any other error of it."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            self.ended.append(Unsaved(self.step, str(error)))

    def take(self) -> Saved | Unsaved | None:
        """A save that has come to its end, once; one that failed after a `wait`."""
        return self.ended.popleft() if self.ended else None

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _write(self, order: Order, boxes: list[Box], stall: float, result: Future[None]) -> None:
        started = time.perf_counter()
        try:
            size, unremoved = self._write_whole(order, boxes)
            self.ended.append(Saved(order.state.step, stall, time.perf_counter() - started, size, unremoved))
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    def _write_whole(self, order: Order, boxes: list[Box]) -> tuple[int, str]:
        """Write the checkpoint, or raise on every rank. Returns its size and what could not be removed."""
        final = folder_of(self.run, order.state.step)
        working = hidden(final)
        try:
            self._on_first(lambda: _begin(working))
            gathered = self._gather(lambda: write_boxes(boxes, working, self.grid.rank))
            self._on_first(lambda: _finish(working, final, order, gathered))
        except OSError:
            if self.grid.rank == 0:
                shutil.rmtree(working, ignore_errors=True)
            raise
        size = sum(file["bytes"] for written in gathered for file in written.files.values())
        return size, self._prune(order) if self.grid.rank == 0 else ""

    def _prune(self, order: Order) -> str:
        try:
            prune(self.run, order.state.step, order.keep_last, order.keep)
        except OSError as error:
            return str(error)
        return ""

    def _on_first(self, action: Callable[[], None]) -> None:
        """Do it on rank 0; every rank waits for it, and an OSError there is raised on every rank."""
        failed = [_caught(action)[1] if self.grid.rank == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(failed, group=self.group)
        if failed[0] is not None:
            raise failed[0]

    def _gather(self, action: Callable[[], Written]) -> list[Written]:
        """Do it on every rank; the results of all on rank 0, none elsewhere. OSErrors of some are raised on every rank."""
        outcome = _caught(action)
        outcomes: list[Any] = [outcome]
        if self.group is not None:
            outcomes = [None] * self.grid.world
            dist.gather_object(outcome, outcomes if self.grid.rank == 0 else None, group=self.group)
        if self.grid.rank != 0:
            outcomes = []
        failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error is not None]

        def tell() -> None:
            if failures:
                raise OSError("; ".join(failures))

        self._on_first(tell)
        return [written for written, _ in outcomes]


def _caught(action: Callable[[], Any]) -> tuple[Any, OSError | None]:
    try:
        return action(), None
    except OSError as error:
        return None, error


# -- the folder --------------------------------------------------------------------------------------------------------


def hidden(folder: Path) -> Path:
    """Where a checkpoint lies while it is written or removed."""
    return folder.with_name(f".{folder.name}.partial")


def _begin(working: Path) -> None:
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)


def _finish(working: Path, final: Path, order: Order, gathered: list[Written]) -> None:
    order.flush()  # before there is a checkpoint that says it was reported
    write_manifest(working, order.state, order.about, gathered)
    _put_in_place(working, final)


def write_manifest(folder: Path, state: State, about: dict[str, Any], gathered: list[Written]) -> None:
    """Say what the files hold that the ranks have written; synced to the disk."""
    manifest = {
        "format": FORMAT,
        "state": asdict(state),
        "about": about,
        "files": {name: info for written in gathered for name, info in written.files.items()},
        "boxes": [
            [entry.tensor, entry.shape, entry.offset, entry.size, entry.file]
            for written in gathered
            for entry in written.entries
        ],
    }
    with open(folder / MANIFEST, "w") as stream:
        json.dump(manifest, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _put_in_place(working: Path, final: Path) -> None:
    _sync_folder(working)
    old = final.with_name(f".{final.name}.old.partial")
    if final.exists():  # a run that was sent back to it, or came here again
        os.rename(final, old)
    os.rename(working, final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(run: Path, step: int, keep_last: int, keep: Callable[[int], bool]) -> None:
    """Leave the last `keep_last` checkpoints up to that of `step`, which was just written, and those to `keep`. Call it
    on one rank; raises OSError.

    Later ones were damaged, or the run would have gone on from them: as they count for the newest, they must go. So does
    what a killed process left half written or half removed.
    """
    for left in (run / CHECKPOINTS).glob(".step-*.partial"):
        shutil.rmtree(left)
    steps = list_steps(run)
    last = [known for known in steps if known <= step][-keep_last:]
    for known in steps:
        if known > step or not (known in last or keep(known)):
            folder = folder_of(run, known)
            os.rename(folder, hidden(folder))
            shutil.rmtree(hidden(folder))
