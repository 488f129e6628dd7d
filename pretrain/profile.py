"""`train --profile`: the ranges of a step in torch.profiler, the trace on the disk, and what it came to.

The training is the same with it: ranges only mark, and on a GPU wait for the device. `pretrain.breakdown` says what counts
as what.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from parallel.collectives import Watch
from parallel.grid import Grid
from pretrain.breakdown import COMMUNICATION, MARK, STEP, break_down, table
from pretrain.config.profile import WARM_UP, check_profile

FOLDER = "profile"


class Unprofiled:
    """Marks nothing."""

    def start(self, done: int, left: int) -> None:
        """The run stands after `done` steps and has `left` to go."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of a step, one of `pretrain.breakdown.PHASES`."""
        return nullcontext()

    def begin_step(self) -> None: ...

    def end_step(self) -> bool:
        """Whether it was the last of those to be measured: `report` has them."""
        return False

    def report(self) -> list[str]:
        """Write the trace; lines that tell where the time went. Collective."""
        return []

    def close(self) -> str:
        """The run is over; says so if the steps to be measured were not."""
        return ""


class Profile(Unprofiled):
    """Measures `steps` steps after WARM_UP. folder: of the run."""

    def __init__(self, steps: int, grid: Grid, folder: Path) -> None:
        self.steps, self.grid, self.folder = steps, grid, folder / FOLDER
        self.first, self.ended, self.closed = 0, 0, True
        self.open = ExitStack()  # the step's range
        activities = [ProfilerActivity.CPU]
        if grid.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, acc_events=True)
        self.watch = Watch(self._communication)

    def start(self, done: int, left: int) -> None:
        """Raises UserError if `left` are too few."""
        check_profile(self.steps, left)
        self.first, self.closed = done + WARM_UP + 1, False
        self.watch.__enter__()
        self.profiler.start()

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.closed else self._range(name)

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        with record_function(MARK + name):
            yield
            if self.grid.device.type == "cuda":
                torch.cuda.synchronize(self.grid.device)

    def _communication(self, group: str) -> AbstractContextManager[object]:
        """Of the main thread and of autograd's, which Python did not start; a checkpoint's thread talks beside the step."""
        here = threading.current_thread()
        if here is threading.main_thread() or isinstance(here, threading._DummyThread):
            return record_function(MARK + COMMUNICATION)
        return nullcontext()

    def begin_step(self) -> None:
        if not self.closed:
            self.open.enter_context(self._range(STEP))

    def end_step(self) -> bool:
        if self.closed:
            return False
        self.open.close()
        self.ended += 1
        self.profiler.step()
        if self.ended < WARM_UP + self.steps:
            return False
        self._stop()
        return True

    def _stop(self) -> None:
        self.closed = True
        self.profiler.stop()
        self.watch.__exit__()

    def report(self) -> list[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.grid.rank}.json.gz"
        self.profiler.export_chrome_trace(str(path))
        everyone = self.grid.from_all(break_down(self.profiler.events()))
        others = (
            f" (and those of the other ranks beside it, to rank-{self.grid.world - 1})" if self.grid.world > 1 else ""
        )
        return [
            *table(everyone, self.first, self.first + self.steps - 1),
            f"its trace: {path}{others}; open it in https://ui.perfetto.dev or chrome://tracing",
        ]

    def close(self) -> str:
        if self.ended >= WARM_UP + self.steps:
            return ""
        if not self.closed:
            self.open.close()
            self._stop()
        return f"--profile: nothing was measured, the run was over before {WARM_UP + self.steps} steps were done"
