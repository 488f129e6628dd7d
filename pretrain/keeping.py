"""Which checkpoints a run keeps, and how it goes on where one cannot be written."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.engine import Engine
from parallel.grid import Grid
from pretrain import checkpoint
from pretrain.checkpoint import State
from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.report import Silent
from pretrain.room import FAILS, Pause, has_room
from pretrain.saving import Order, Saver, Unsaved
from pretrain.schedule import Plan


class Keeper:
    """Saves a run's checkpoints, on every rank. A disk that has no room for one pauses saving; the run ends by it only
    where its last checkpoint cannot be written."""

    def __init__(self, config: Config, grid: Grid, plan: Plan) -> None:
        self.config, self.grid, self.plan = config, grid, plan
        self.folder = Path(config.run.dir)
        self.saver = Saver(self.folder, grid)
        self.pause = Pause()
        self.lost: Unsaved | None = None  # the last one, while saving is paused

    def keeps(self, state: State, step: int) -> bool:
        """Whether, with the run in `state`, a step's checkpoint is kept however old it is: it has the best validation
        loss, or an interval of `checkpoint.keep_every` ended with it."""
        settings = self.config.checkpoint
        best = settings.keep_best and state.best_step == step
        return best or self.plan.due(settings.keep_every, step - 1, step)

    @property
    def failed(self) -> bool:
        """The last save has failed, and `finish` was not called since. The same on all ranks, but not at the same time."""
        return self.saver.failed

    @property
    def tries_again(self) -> bool:
        """Whether there may be room now for what could not be saved. Rank 0 speaks for all."""
        return self.grid.rank == 0 and self.pause.has_passed() and has_room(self.folder, self.saver.bytes)

    def save(self, state: State, about: dict[str, Any], engine: Engine, reporter: Silent) -> None:
        """Begin to save; what is in flight is saved first. Collective."""
        keep = functools.partial(self.keeps, state)  # the state as it is now, whenever the thread comes to ask
        order = Order(state, about, self.config.checkpoint.keep_last, keep, reporter.flush)
        with reporter.pause():
            self.saver.save(order, engine)
        self.tell(reporter)

    def finish(self, reporter: Silent) -> None:
        """Until no save is in flight."""
        with reporter.pause():
            self.saver.wait()
        self.tell(reporter)

    def end(self, reporter: Silent) -> None:
        """The same at the run's end. Raises UserError, on every rank, where the last checkpoint could not be written."""
        self.finish(reporter)
        if self.lost is not None:
            raise self._unwritten(f"the checkpoint of step {self.lost.step}", self.lost.error)

    def tell(self, reporter: Silent) -> None:
        while ended := self.saver.take():
            if isinstance(ended, Unsaved):
                self.lost = ended
                self.pause.begin()
                reporter.unsaved(ended, self._newest())
            else:
                self.lost = None
                self.pause.over()
                reporter.saved(ended)

    def _newest(self) -> str:
        steps = checkpoint.list_steps(self.folder)
        return f"the last good one is step {steps[-1]}" if steps else "there is none yet"

    def _unwritten(self, what: str, error: str) -> UserError:
        return UserError(
            f"{what} could not be written: {error}\n"
            f"Nothing was lost of the checkpoints before ({self._newest()}). Free space and start again with\n"
            f"  python -m pretrain train {self.folder}"
        )

    @contextlib.contextmanager
    def report_may_fail(self, what: str) -> Iterator[None]:
        """What is reported inside, as a run begins and ends, may find no room."""
        try:
            yield
        except OSError as error:
            if error.errno not in FAILS:
                raise
            with contextlib.suppress(Exception):
                self.saver.wait()  # one that is under way may yet be the last good one
            raise self._unwritten(what, str(error)) from error
