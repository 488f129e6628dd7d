"""Inside a rank of a tortured run: what it trains on is written down as it goes, and it dies at a chosen place.

Places are those that any way of saving passes, in whichever thread: the phases that the heartbeat marks, and operations
on files below `checkpoints/`. Python reports opening, renaming and removing by itself (audit events); writing and syncing
are watched here, so that a write can be left half done.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import xxhash

FILES = ("open", "write", "fsync", "rename", "remove", "mkdir")  # operations on files; all else are phases
AUDITED = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "remove", "os.mkdir": "mkdir"}


@dataclass(frozen=True)
class Spot:
    """Where a rank stands when it is about to do something for the count-th time."""

    what: str  # a phase, or one or more of FILES divided by "|"
    where: str = ""  # pattern in the path of the file
    count: int = 1

    def __str__(self) -> str:
        return f"{self.what} number {self.count}" + (f" of {self.where}" if self.where else "")


@dataclass(frozen=True)
class Death:
    """A signal at a spot. delay: seconds from there on, after which another process sends it, wherever the ranks are."""

    kind: str
    spot: Spot
    rank: int = 0  # which comes to the spot
    everyone: bool = False  # all ranks get the signal, not this one alone
    delay: float = 0.0
    number: int = signal.SIGKILL

    def __str__(self) -> str:
        whom = "all ranks" if self.everyone else f"rank {self.rank}"
        later = f" and {1000 * self.delay:.0f} ms" if self.delay else ""
        return f"{self.kind}: {signal.Signals(self.number).name} to {whom} at {self.spot}{later}"


def arm(records: Path, death: Death | None) -> None:
    """Prepare this process before it runs the program. records: an empty folder for what the ranks write down."""
    rank = int(os.environ["RANK"])
    (records / f"rank-{rank}.pid").write_text(str(os.getpid()))
    _record_steps(records / f"rank-{rank}.jsonl")
    if death is not None and death.rank == rank:
        trigger = _Trigger(death, records)
        _watch_phases(trigger)
        _watch_files(trigger)


# -- what was trained on ---------------------------------------------------------------------------------------------


def _record_steps(path: Path) -> None:
    """A line for each step that ended: this rank's sample numbers, each with hashes of the tokens that the model got."""
    from pretrain.train import Run

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    advance = Run.advance

    def recorded(run: Run, data: Any, update: Any) -> None:
        advance(run, data, update)
        rows = torch.cat([torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1) for batch in data.batches])
        samples = [
            (number, xxhash.xxh64_intdigest(row.tobytes(), seed=number), xxhash.xxh64_intdigest(row.tobytes()))
            for number, row in zip(data.numbers.tolist(), rows.numpy().astype("<u4"), strict=True)
        ]
        line = {
            "step": run.state.step,
            "slice": run.grid.data_rank,
            "applied": bool(update.applied),
            "samples": samples,
        }
        os.write(file, json.dumps(line).encode() + b"\n")

    Run.advance = recorded  # type: ignore[method-assign]


# -- dying -------------------------------------------------------------------------------------------------------------


class _Trigger:
    """Counts how often the spot is reached, by any thread, and strikes."""

    def __init__(self, death: Death, records: Path) -> None:
        self.death, self.records = death, records
        self.operations, self.where = death.spot.what.split("|"), re.compile(death.spot.where)
        self.count, self.lock = 0, threading.Lock()
        self.killer = _fork_killer(death, self._targets) if death.delay else None

    def here(self, what: str, path: str = "", before: Callable[[], None] | None = None) -> None:
        """This rank is about to do it. before: to be done just before it dies."""
        if what not in self.operations or not self.where.search(path):
            return
        with self.lock:
            self.count += 1
            strikes = self.count == self.death.spot.count
        if strikes:
            if before is not None:
                before()
            self._strike()

    def _strike(self) -> None:
        if self.killer is not None:
            os.write(self.killer, b"!")
            return
        for process in self._targets(os.getpid()):
            os.kill(process, self.death.number)

    def _targets(self, own: int) -> list[int]:
        """Own process last: who gets SIGKILL sends no more."""
        others = [int(path.read_text()) for path in self.records.glob("*.pid")] if self.death.everyone else []
        return [*(process for process in others if process != own), own]


def _fork_killer(death: Death, targets: Callable[[int], list[int]]) -> int:
    """A process that sends the signal some time after a byte comes through the pipe, which is returned."""
    mother = os.getpid()
    ours, theirs = os.pipe()
    if os.fork() == 0:
        os.close(theirs)
        _be_killer(ours, death, lambda: targets(mother))
    os.close(ours)
    return theirs


def _be_killer(pipe: int, death: Death, targets: Callable[[], list[int]]) -> NoReturn:
    try:
        if os.read(pipe, 1):
            # Not by their numbers, which others may have when they have ended before their time.
            handles = [os.pidfd_open(process) for process in targets()]
            time.sleep(death.delay)
            for handle in handles:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, death.number)
    finally:
        os._exit(0)


# -- watching ----------------------------------------------------------------------------------------------------------


def _watch_phases(trigger: _Trigger) -> None:
    from pretrain.heartbeat import Heartbeat

    mark = Heartbeat.mark

    def marked(self: Heartbeat, step: int, phase: str) -> None:
        mark(self, step, phase)
        trigger.here(phase)

    Heartbeat.mark = marked  # type: ignore[method-assign]


def _watch_files(trigger: _Trigger) -> None:
    """Operations on files below `checkpoints/`. A folder's path ends in a slash when it is synced."""

    def reach(what: str, path: str, before: Callable[[], None] | None = None) -> None:
        if "/checkpoints/" in path:
            trigger.here(what, path, before)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in AUDITED:
            reach(AUDITED[event], _whole_path(args[0], args[-1 if event != "os.rename" else 2]))
        elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and not isinstance(args[0], int):
            reach("open", os.fsdecode(args[0]))

    sys.addaudithook(audit)
    _watch_syncs(reach)
    _watch_writes(reach)


def _whole_path(path: Any, folder: int) -> str:
    """The path of an audit event; folder: a descriptor that it is relative to, or -1."""
    named = os.fsdecode(path)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), named) if folder >= 0 else named


def _watch_syncs(reach: Callable[..., None]) -> None:
    fsync = os.fsync

    def synced(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        reach("fsync", os.readlink(f"/proc/self/fd/{number}"))
        fsync(file)

    os.fsync = synced


def _watch_writes(reach: Callable[..., None]) -> None:
    """Of files opened by `open`, and of descriptors."""
    opened, written = io.open, os.write

    def watched_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        stream = opened(file, mode, *args, **options)
        if isinstance(file, int) or mode.startswith("r"):
            return stream
        return _Watched(stream, os.fsdecode(file), reach) if "/checkpoints/" in os.fsdecode(file) else stream

    def watched_write(number: int, data: Any) -> int:
        reach("write", os.readlink(f"/proc/self/fd/{number}"), lambda: _half(data, lambda part: written(number, part)))
        return written(number, data)

    io.open = builtins.open = watched_open  # type: ignore[assignment]
    os.write = watched_write


class _Watched:
    """A file that is open for writing."""

    def __init__(self, stream: Any, path: str, reach: Callable[..., None]) -> None:
        self._stream, self._path, self._reach = stream, path, reach

    def write(self, data: Any) -> int:
        def half() -> None:
            _half(data, self._stream.write)
            self._stream.flush()

        self._reach("write", self._path, half)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _half(data: Any, write: Callable[[Any], Any]) -> None:
    whole = data if isinstance(data, str) else memoryview(data).cast("B")
    write(whole[: len(whole) // 2])
