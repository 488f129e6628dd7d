"""The ranges of some steps in torch.profiler, the trace on the disk, and what it came to.

Which steps: of `train --profile N`, of `monitor.profile_steps`, or the next ones, when somebody makes the file RUN/profile
while the run goes on (`touch`; it is taken away when it is seen). The step before warms the profiler up. Traces lie beside
TensorBoard's files, named as its plugin for torch's traces looks for them; Perfetto opens each as it is. A request is of few
steps, the ranks that hold one copy of the model write it, and only the last KEPT requests stay, so the disk does not fill.

The training is the same with it: ranges only mark, and on a GPU wait for the device. `pretrain.breakdown` says what counts
as what.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from parallel.collectives import Watch
from parallel.grid import Grid
from pretrain.breakdown import COMMUNICATION, MARK, STEP, break_down, table
from pretrain.charts import FOLDER
from pretrain.config.profile import DEFAULT, WARM_UP, check_profile

REQUEST = "profile"  # in a run's folder
TRACE = "rank-{rank}.{step}.pt.trace.json.gz"
KEPT = 5
LOOK_SECONDS = 1.0  # a look for the request is one for a file on a disk that may be far


class Recording:
    """torch.profiler over steps that follow one another, of which the first only warms it up."""

    def __init__(self, grid: Grid, steps: int) -> None:
        self.grid, self.left = grid, steps + 1
        self.open = ExitStack()  # the step's range
        activities = [ProfilerActivity.CPU]
        if grid.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, acc_events=True)
        self.watch = Watch(self._communication)
        self.watch.__enter__()
        self.profiler.start()

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
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
        self.open.enter_context(self.range(STEP))

    def end_step(self) -> bool:
        """Whether it was the last."""
        self.open.close()
        self.profiler.step()
        self.left -= 1
        if not self.left:
            self.stop()
        return not self.left

    def stop(self) -> None:
        self.open.close()
        self.profiler.stop()
        self.watch.__exit__()


class Profiler:
    """The profiling of one session of a run. folder: the run's."""

    def __init__(self, grid: Grid, folder: Path) -> None:
        self.grid, self.request, self.traces = grid, folder / REQUEST, folder / FOLDER
        self.steps: range | None = None  # that are to be measured, or are
        self.recording: Recording | None = None
        self.first: int | None = None  # steps that --profile is to measure
        self.looked = 0.0

    def start(self, done: int, left: int, steps: list[int] | None) -> None:
        """The run stands after `done` steps and has `left` to go. steps: `monitor.profile_steps`, of which those are
        measured that are still ahead. Raises UserError where --profile has too few."""
        if self.first is not None:
            check_profile(self.first, left)
            self.steps = range(done + WARM_UP + 1, done + WARM_UP + 1 + self.first)
        elif steps is not None:
            ahead = range(max(steps[0], done + 2), steps[1] + 1)
            self.steps = ahead or None

    def asked(self) -> bool:
        """Whether RUN/profile was made. For rank 0, which tells all."""
        now = time.monotonic()
        if self.grid.rank or self.steps or now - self.looked < LOOK_SECONDS:
            return False
        self.looked = now
        if not self.request.is_file():
            return False
        self.request.unlink(missing_ok=True)
        return True

    def ask(self, step: int, last: int) -> str:
        """Measure the steps behind the next, in this one, as all ranks must; says what was understood. last: of the run."""
        self.steps = range(step + 2, min(step + 2 + DEFAULT, last + 1)) or None
        if self.steps is None:
            return f"step {step}: {self.request} comes too late to profile a step of this run"
        return f"step {step}: {self.request} was made, steps {self.steps[0]} to {self.steps[-1]} are profiled"

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of a step, one of `pretrain.breakdown.PHASES`."""
        return nullcontext() if self.recording is None else self.recording.range(name)

    def begin_step(self, step: int) -> None:
        if self.steps and step == self.steps[0] - 1:
            self.recording = Recording(self.grid, len(self.steps))
        if self.recording is not None:
            self.recording.begin_step()

    def end_step(self) -> bool:
        """Whether it was the last of those to be measured: `report` has them."""
        return self.recording is not None and self.recording.end_step()

    def report(self) -> list[str]:
        """Write the trace; lines that tell where the time went. Collective."""
        assert self.recording is not None and self.steps is not None
        profiler, steps = self.recording.profiler, self.steps
        self.recording = self.steps = None
        self.first = None
        told = self._write(profiler, steps[0])
        everyone = self.grid.from_all(break_down(profiler.events()))
        return [*table(everyone, steps[0], steps[-1]), told]

    def _write(self, profiler: profile, step: int) -> str:
        """Says where. Ranks that hold the same as others, and do the same, write none."""
        rank, count = self.grid.rank, self.grid.world // self.grid.replica_size
        path = self.traces / TRACE.format(rank=rank, step=step)
        if self.grid.replica_rank:
            return ""
        try:
            self.traces.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            self._remove_old()
            size = path.stat().st_size / 1e6
        except OSError as error:  # which is no reason to end the run
            return f"warning: the trace could not be written: {error}"
        others = f" (and beside it those of the {count} ranks that hold one model together)" if count > 1 else ""
        return f"its trace, {size:,.1f} MB: {path}{others}; open it in https://ui.perfetto.dev or chrome://tracing"

    def _remove_old(self) -> None:
        """Of this rank's traces the oldest."""
        ours = self.traces.glob(TRACE.format(rank=self.grid.rank, step="*"))
        for path in sorted(ours, key=lambda path: path.stat().st_mtime)[:-KEPT]:
            path.unlink()

    def close(self) -> str:
        """The run is over; says so if what was to be measured was not."""
        recording, self.recording = self.recording, None
        if recording is not None:
            recording.stop()
        if self.first is not None:
            return f"--profile: nothing was measured, the run was over before {WARM_UP + self.first} steps were done"
        if recording is not None and self.steps is not None:
            return f"the run was over before step {self.steps[-1]}, so what was to be profiled is not"
        return ""
