"""Where a step's time goes on each rank: computing, waiting for other ranks, and the engine's own overhead.

Everything of a step but the prefetch of its tokens happens in one thread of a rank (on a CPU the backward pass too), so
its time splits without overlaps:

    communication   inside a process group's methods and `Work.wait`: issuing, and waiting for others; by group
    computation     self times of torch's operators, by torch.profiler
    overhead        the rest: Python of this engine, DeepSpeed and megatron-core, autograd's bookkeeping, the profiler

The split is measured in steps of their own under the profiler, whose cost falls into the overhead, so that is an upper
bound. Which modules' Python it is: cProfile's own times of their frames, in other steps again (it slows Python down, so
it is an upper bound too).
"""

from __future__ import annotations

import cProfile
import itertools
import pstats
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from bare import bare_steps
from torch.overrides import TorchFunctionMode
from workload import layout_overrides, start_run, steps

from parallel.collectives import Watch
from parallel.grid import Grid

MARK = "benchmark step"


class Meter:
    """Seconds of one thread inside collectives and exchanges, by the ranks they are among."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.names: dict[str, str] = {}  # name of a process group -> axis
        self.watch = Watch(self._timed)

    def install(self, grid: Grid) -> None:
        self.names = axis_names(grid)
        self.watch.__enter__()

    @contextmanager
    def _timed(self, group: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[self.names.get(group, "other")] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds since the last time."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken


def axis_names(grid: Grid) -> dict[str, str]:
    """Process groups' names -> their axis. DeepSpeed makes copies of groups: those go by their ranks."""
    groups = {
        "tensor": grid.tensor.group,
        "context": grid.context.group,
        "pipeline": grid.pipeline_group,
        "data": grid.replica_group,
        "embedding": grid.embedding_group,
        "model": grid.model_group,
        "world": dist.group.WORLD,
    }
    known = {axis: group for axis, group in groups.items() if group is not None and dist.get_world_size(group) > 1}
    by_ranks = {tuple(dist.get_process_group_ranks(group)): axis for axis, group in reversed(known.items())}
    names = {
        group.group_name: by_ranks.get(tuple(dist.get_process_group_ranks(group)), "other")
        for group in dist.distributed_c10d._world.pg_map
        if group is not None
    }
    return {**names, **{group.group_name: axis for axis, group in reversed(known.items())}}


def measure_layout(config: str, layout: str, count: int) -> dict[str, Any]:
    """In a rank: `count` steps plain, `count` under torch.profiler, `count` under cProfile, after two to warm up.

    Returns means over the ranks, in seconds a step.
    """
    run = start_run(config, layout_overrides(layout))
    return {**_measure(steps(run), run.grid, count), "engine": type(run.engine).__name__, "steps": count}


def measure_bare(config: str, count: int) -> dict[str, Any]:
    """The same of the bare loop, in one process: what of the overhead is torch's own and the profiler's."""
    run = start_run(config, layout_overrides("zero=0"))
    return {**_measure(bare_steps(run), run.grid, count), "engine": "bare loop", "steps": count}


def _measure(training: Iterator[float], grid: Grid, count: int) -> dict[str, Any]:
    meter = Meter()
    meter.install(grid)
    for _ in range(2):
        next(training)
    meter.take()
    plain = list(itertools.islice(training, count))
    waits = {axis: seconds / count for axis, seconds in meter.take().items()}
    ours = {
        "step": statistics.median(plain),
        "waits": waits,
        **_split(training, meter, count),
        "python": _python(training, count),
    }
    everywhere: list[Any] = [None] * grid.world
    dist.all_gather_object(everywhere, ours)
    return _mean(everywhere)


def _mean(found: list[Any]) -> Any:
    """Mean over the ranks of every number; what a rank lacks is 0 there."""
    if isinstance(found[0], dict):
        keys = sorted({key for one in found for key in one})
        empty: Any = {} if any(isinstance(v, dict) for one in found for v in one.values()) else 0.0
        return {key: _mean([one.get(key, empty) for one in found]) for key in keys}
    return sum(found) / len(found)


def _split(training: Iterator[float], meter: Meter, count: int) -> dict[str, float]:
    """Computation, communication and the rest of the same steps."""
    seconds = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            with torch.profiler.record_function(MARK):
                seconds.append(next(training))
    events = profiler.events()
    thread = next(event.thread for event in events if event.name == MARK)
    mine = [event for event in events if event.thread == thread]
    computing = sum(event.self_cpu_time_total for event in mine if event.name.startswith("aten::")) / 1e6
    communicating = sum(meter.take().values())
    return {
        "profiled_step": sum(seconds) / count,
        "computation": computing / count,
        "communication": communicating / count,
        "overhead": (sum(seconds) - computing - communicating) / count,
        "operators": sum(event.name.startswith("aten::") for event in mine) / count,
    }


def _python(training: Iterator[float], count: int) -> dict[str, float]:
    """Own seconds a step of Python frames, by module; C functions that they call are left out."""
    with _Called(), _profiling() as profile:
        for _ in range(count):
            next(training)
    found: dict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if file != "~" and "/benchmarks/" not in file:  # ~: C functions, among them the operators
            found[_module(file)] += own / count
    return dict(found)


class _Called(TorchFunctionMode):
    """Turns `a @ b` and its kin into calls of C functions, which cProfile tells apart from the frame that they stand in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def _profiling() -> Iterator[cProfile.Profile]:
    profile = cProfile.Profile()
    profile.enable()
    try:
        yield profile
    finally:
        profile.disable()


def _module(file: str) -> str:
    """`.../site-packages/deepspeed/runtime/engine.py` -> `deepspeed.runtime.engine`; the standard library is `python`."""
    for package in ("deepspeed", "megatron", "torch", "pretrain", "parallel", "kernels"):
        match = re.search(rf"/({package}(?:/[\w.]+)*)\.py$", file)
        if match:
            return match[1].replace("/", ".")
    return "python"


def by_package(python: dict[str, float]) -> dict[str, float]:
    """Seconds of modules added up to this engine's, DeepSpeed's, megatron-core's, torch's and Python's own."""
    ours = {"pretrain": "engine", "parallel": "engine", "kernels": "engine"}
    found: dict[str, float] = defaultdict(float)
    for module, seconds in python.items():
        package = module.split(".")[0]
        found[ours.get(package, package)] += seconds
    return dict(found)
