"""Peak memory of each rank beside the formula (`pretrain.memory`).

Measured is what torch's allocator hands out, exactly: torch.profiler notes every allocation and release of a tensor from
before the model is made, and the bytes alive are added up over time. It notes what the rank's own thread does; what gloo's
threads release is known at the latest when its address is given out again. Not in it are the processes themselves
(libraries, threads), gloo's buffers and the tokens read ahead, which are numpy's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from workload import layout_overrides, start_run

from pretrain.build import stage_layers
from pretrain.memory import memory
from pretrain.trainable import frozen_on

FORWARD_BACKWARD, UPDATE = "benchmark: forward and backward", "benchmark: update"
STEPS = 2  # the last is measured: the first makes what stays


def measure(config: str, layout: str, overrides: list[str]) -> list[dict[str, Any]]:
    """In a rank: peak bytes of a step, and the formula's parts; of each rank."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run = start_run(config, [*layout_overrides(layout), *overrides])
        for data in itertools.islice(run.data(), STEPS):
            with torch.profiler.record_function(FORWARD_BACKWARD):
                loss = run.forward_backward(data)
            with torch.profiler.record_function(UPDATE):
                update = run.update()
            run.advance(data, update)
            run.log(data, loss, update)
    vocab_size = run.sources.vocabulary.size
    layers = stage_layers(run.config, vocab_size)
    formula = memory(
        run.config,
        run.grid.layout,
        layers,
        vocab_size,
        run.grid.stage,
        frozen=frozen_on(run.built.stages, run.config.model),
    )
    ours = {**_peaks(profiler), "formula": formula._asdict(), "expected": formula.peak}
    everywhere: list[Any] = [None] * run.grid.world
    dist.all_gather_object(everywhere, ours)
    return everywhere


def _peaks(profiler: Any) -> dict[str, int]:
    """Bytes alive: before the last step, the most in its two parts, and the most of all."""
    events = sorted(_events(profiler), key=lambda event: event.start_time_ns)
    begin = max(event.start_time_ns for event in events if event.name == FORWARD_BACKWARD)
    middle = max(event.start_time_ns for event in events if event.name == UPDATE)
    peaks = {"held": 0, "forward_backward": 0, "update": 0}
    held: dict[int, int] = {}  # address -> bytes
    alive = 0
    for event in events:
        if event.tag != _EventType.Allocation:
            continue
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        alive += max(size, 0) - held.pop(address, 0)
        if size > 0:
            held[address] = size
        if event.start_time_ns < begin:
            peaks["held"] = alive
        else:
            part = "forward_backward" if event.start_time_ns < middle else "update"
            peaks[part] = max(peaks[part], alive)
    return {**peaks, "measured": max(peaks.values())}


def _events(profiler: Any) -> Iterator[Any]:
    """All events, in no order."""
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation or event.name in (FORWARD_BACKWARD, UPDATE):
            yield event
