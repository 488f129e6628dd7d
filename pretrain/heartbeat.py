"""Who was first to part: each rank's step and phase, kept where the others can read it.

A rank that dies or hangs leaves the others waiting in a collective. What they learn there is that a connection closed or a
time was over, not whose fault it is: the next rank in the chain may be a victim itself. So each rank writes a beat a
second (a counter, its step and phase) to the key-value store that torch.distributed keeps on rank 0. Who has lost the
others reads all beats, waits for two more and reads again. First of all is a rank that ended by an error of its own; then
ranks whose beat stands still (killed, stopped, off the network); then ranks that live but lag behind. The finding that
is in the store first is the one that all tell.

Beats are compared with themselves, never with a clock, so hosts need not agree on the time and a job that was suspended
as a whole goes on. Collectives on a GPU raise nothing that Python could catch, so each rank also watches the beat of the
next one (a ring: one read a second, however many ranks), and the finding.

A rank that parts from the others ends with exit code 3 and one line. Before it stand the Python stacks of its threads and,
where it has read all beats, the place of every rank, with the collective that its main thread was in as it beat. A rank
whose interpreter does not run, since native code keeps its lock, beats no more and can say nothing itself: faulthandler, which
needs no lock, then writes its stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch.distributed as dist

from parallel.meeting import NotMet
from pretrain import stacks
from pretrain.errors import Exit
from pretrain.pulse import Pulse

BEAT = 1.0  # seconds
LOOK = 2.2 * BEAT  # seconds in which a living rank beats twice
ANSWER = 2.0  # seconds more that the store may take
FINDING = "finding"
DONE = "done"  # the phase after the last


class Beat(NamedTuple):
    """A rank as the others see it."""

    number: int  # of this beat
    marks: int  # places passed since the start, the same in the same place on every rank
    step: int
    phase: str
    host: str
    lost: bool  # has lost the others itself
    ended: str  # by which error of its own
    inside: str = ""  # the function that the main thread was in, or the collective
    collective: str = ""  # the last one that it was seen in
    reads: str = ""  # what its main thread waits to be read

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase

    @property
    def seen(self) -> str:
        """The place, and what it waits to be read."""
        return f"{self.place} ({self.reads})" if self.reads else self.place

    @property
    def told(self) -> str:
        """The place, and what it was in there."""
        inside = f" ({self.inside})" if self.inside else ""
        return f"{self.place}{inside}{f'; last seen in a collective: {self.collective}' if self.works else ''}"

    @property
    def works(self) -> bool:
        """It was in no collective, though it has been in some."""
        return bool(self.collective) and not self.collective.startswith(self.inside)


class Heartbeat:
    """This rank's place in the run, as `mark` sets it; with several ranks, from `start` on, their watch.

    Used as a context around all that needs the other ranks: leaving it by an error of torch.distributed ends the process.
    timeout: seconds that a rank may wait for another.
    """

    def __init__(self, rank: int = 0, world: int = 1, timeout: float = 0.0) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.now = Beat(0, 0, 0, "start", platform.node(), False, "")
        self.shared: Any = None
        self.store: Any = None
        self.heard: Beat | None = None  # of the next rank
        self.everyone: list[Beat | None] = []  # once they were asked for a finding
        self.pulse: Pulse | None = None
        self.reader: Callable[[], str] = str  # what the main thread waits to be read now, in words
        self.first: Beat | None = None  # of rank 0, which may not answer when it is asked
        self.finding = ""
        self.left: stacks.Inside | None = None  # what the main thread was in when it lost the others
        self.over = threading.Event()  # the main thread leaves the context
        self.leaving = threading.Lock()  # one thread tells and ends
        self.beats = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def mark(self, step: int, phase: str) -> None:
        """The main thread is here now."""
        self.now = self.now._replace(marks=self.now.marks + 1, step=step, phase=phase)

    def start(self) -> None:
        """Begin to beat; the ranks have met."""
        if self.world == 1:
            return
        self.shared = dist.distributed_c10d._get_default_store()  # held, or rank 0's would end with the groups
        # A connection of our own: on the main one a wait would keep the beats waiting.
        self.store = dist.PrefixStore("heartbeat", self.shared.clone())
        self.store.set(self._key(self.rank), json.dumps(self.now))
        self.beats.start()
        threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True).start()

    def show(self, folder: Path) -> None:
        """Keep the place in the run's folder too, on rank 0, for whoever looks from outside."""
        if self.rank == 0:
            self.pulse = Pulse(
                folder, lambda: (self.now.step, f"failed: {self.now.ended}" if self.now.ended else self.now.phase)
            )

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.world > 1 and error is not None and lost_others(error):
            self.left, self.now = stacks.inside(stacks.of_error(traceback)), self.now._replace(lost=True)
            waited = "timed out" in str(error).lower() or isinstance(error, NotMet)
            how = f"waited {self.timeout:g} s for" if waited else "lost"
            finding = str(error) if isinstance(error, NotMet) else self.find()
            if finding:
                self._leave(how, stacks.of_error(traceback), finding)
        self.now = self.now._replace(phase=DONE) if error is None else self.now._replace(ended=_first_line(error))
        self.over.set()
        if self.pulse is not None:
            self.pulse.stop()
        if self.beats.is_alive():
            self.beats.join(ANSWER)
            faulthandler.cancel_dump_traceback_later()

    # -- the two threads -----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Write a beat, read the next rank's and the finding; the last beat says how the run has ended here."""
        following, collective = (self.rank + 1) % self.world, ""
        with contextlib.suppress(RuntimeError):  # the store is gone: `_watch` hears nothing new
            for number in itertools.count(1):
                over = self.over.is_set()
                faulthandler.dump_traceback_later(max(self.timeout, 3 * BEAT), file=2)
                inside, collective = self._look(collective)
                beat = self.now._replace(number=number, inside=inside, collective=collective, reads=self.reader())
                self.store.set(self._key(self.rank), json.dumps(beat))
                if over:
                    return
                self.heard, self.first = self._read(following), self._read(0)
                self.finding = self._read_finding()
                self.over.wait(BEAT)

    def _look(self, collective: str) -> tuple[str, str]:
        """At the main thread, which pays nothing for it: what it is in, and the last collective that it was seen in."""
        inside = self.left or stacks.inside(stacks.main_thread())
        return str(inside), f"{inside}, step {self.now.step}" if inside.collective else collective

    def _watch(self) -> None:
        """End this process when the others have parted and its main thread does not notice."""
        limit = max(3, round(self.timeout / BEAT) - 1)
        quiet, before = 0, self.heard
        while not self.over.wait(BEAT):
            same = self.heard == before and not (before and before.phase == DONE)
            quiet, before = quiet + 1 if same else 0, self.heard
            if self.finding or quiet >= limit:
                if self.over.wait(LOOK) or self.now.lost:  # it has an error, and tells
                    return
                finding = self.find()
                self._leave("waited for", stacks.main_thread(), finding or "no rank has parted")

    def _key(self, rank: int) -> str:
        return f"beat-{rank}"

    def _read(self, rank: int) -> Beat | None:
        key = self._key(rank)
        return Beat(*json.loads(self.store.get(key))) if self.store.check([key]) else None

    def _read_all(self) -> list[Beat | None]:
        keys = [self._key(rank) for rank in range(self.world)]
        if self.store.check(keys):
            return [Beat(*json.loads(value)) for value in self.store.multi_get(keys)]
        return [self._read(rank) for rank in range(self.world)]

    def _read_finding(self) -> str:
        return self.store.get(FINDING).decode() if self.store.check([FINDING]) else ""

    # -- finding out and telling ---------------------------------------------------------------------------------------

    def find(self) -> str:
        """Who was first to part, in words; empty if all ranks answer and stand at the same place."""
        if self.store is None:
            return f"not all {self.world} ranks have come"
        if self.finding:
            return self.finding
        found: list[str] = []
        answered = threading.Event()
        # A store that does not answer would keep us for ever.
        thread = threading.Thread(target=self._find, args=(answered, found), daemon=True)
        thread.start()
        if answered.wait(ANSWER):
            thread.join(LOOK + ANSWER)
        if found or self.finding:
            return self.finding or found[0]
        what = "did not answer, nor the store that it keeps"  # torch.distributed's, in its process
        return _tell({0: self.first}, what) if self.first else f"rank 0 {what}"

    def _find(self, answered: threading.Event, found: list[str]) -> None:
        with contextlib.suppress(RuntimeError):
            try:
                before, finding = self._read_all(), self._read_finding()
            finally:
                answered.set()
            if not finding:
                time.sleep(LOOK)
                self.everyone = self._read_all()
                finding = first_to_part(before, self.everyone)
            if finding:
                finding = self.store.compare_set(FINDING, "", finding).decode()
            found.append(finding)

    def _leave(self, how: str, main: stacks.Lines, finding: str) -> None:
        """Say it and end the process, whatever its other threads wait for."""
        if not self.leaving.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends us
        name, where = f"rank {self.rank} ({self.now.host})", stacks.inside(main)
        lines = [*stacks.told(main), *(["where the ranks were:", *places(self.everyone)] if self.everyone else [])]
        line = f"{name}: {self.now.place}: {how} the others ({where}): {finding}"
        sys.stdout.flush()
        print("\n".join([*(f"{name}: {text}" for text in lines), line]), file=sys.stderr, flush=True)
        if self.rank == 0 and self.world > 2:
            time.sleep(1.5 * BEAT)  # the store ends with us: let the others read the finding
        os._exit(Exit.PARTED)


def first_to_part(before: Sequence[Beat | None], after: Sequence[Beat | None]) -> str:
    """In words, from the beats of all ranks and again those some time later; empty if none stands out."""
    known = {rank: beat for rank, beat in enumerate(after) if beat is not None and beat.phase != DONE}
    ended = {rank: beat for rank, beat in known.items() if beat.ended}
    silent = {rank: beat for rank, beat in known.items() if beat == before[rank]}
    lowest = min((beat.marks for beat in known.values()), default=0)
    behind = {rank: beat for rank, beat in known.items() if beat.marks == lowest and not beat.lost}
    behind = {rank: beat for rank, beat in behind.items() if beat.works} or behind  # the others of these wait for them
    if ended:
        return _tell(ended, "ended by itself") + "".join(f" ({beat.ended})" for beat in ended.values())
    if silent:
        return _tell(silent, "did not answer")
    if len(behind) < len(known) and behind:
        return _tell(behind, "was behind")
    return ""


def places(everyone: Sequence[Beat | None]) -> Iterator[str]:
    """A line for all ranks that are at the same place: thousands of them are a few lines."""
    ranks: dict[str, list[int]] = {}
    for rank, beat in enumerate(everyone):
        ranks.setdefault(beat.told if beat is not None else "never beat", []).append(rank)
    for place, at in ranks.items():
        hosts = sorted({beat.host for rank in at if (beat := everyone[rank]) is not None})
        named = f" ({', '.join(hosts[:3])}{', ...' if len(hosts) > 3 else ''})" if hosts else ""
        yield f"  {'ranks' if len(at) > 1 else 'rank'} {_ranges(at)}{named}: {place}"


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> 0-2, 5"""
    runs = [list(run) for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs)


def _tell(beats: dict[int, Beat], what: str) -> str:
    return "; ".join(f"rank {rank} ({beat.host}) {what}, its last beat: {beat.seen}" for rank, beat in beats.items())


def lost_others(error: BaseException) -> bool:
    """Whether torch.distributed raised it because another rank went or did not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]:.200}" if text else type(error).__name__
