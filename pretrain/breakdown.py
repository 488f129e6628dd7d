"""Where the time of profiled steps went, from what torch.profiler recorded.

A step is the wall time that `pretrain.report` counts for its rates too. It is cut by the host's clock:

    data, forward, backward, optimizer    in their ranges, but for the communication in them; recomputation is backward
    communication    where the host issues a collective or waits for one, and where a GPU runs kernels of NCCL and no other
    Python (rest)    outside all of these: the loop, the schedule's bookkeeping, the report

so the parts never overlap and their sum is the step. On a GPU, which works behind the host, every range ends by waiting
for it (`pretrain.profile`), and so holds the time of its kernels.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch.autograd import DeviceType

MARK = "pretrain: "  # the ranges of ours in a trace
STEP, COMMUNICATION, REST = "step", "communication", "Python (rest)"
PHASES = ("data", "forward", "backward", "optimizer")
PARTS = ("data", "forward", "backward", COMMUNICATION, "optimizer", REST)
LONGEST = 10

Intervals = list[tuple[float, float]]  # microseconds; sorted and apart where they come from `union` or `minus`


class Operator(NamedTuple):
    name: str
    seconds: float  # a step, of its own: without the operators that it calls
    calls: float  # a step


class Breakdown(NamedTuple):
    """Means a step."""

    parts: dict[str, float]  # seconds, of each of PARTS; their sum is the step
    operators: list[Operator]  # the longest first


def break_down(events: Iterable[Any]) -> Breakdown:
    """events: torch.profiler's FunctionEvents, with ranges named MARK + (STEP, one of PHASES or COMMUNICATION)."""
    host = [event for event in events if event.device_type == DeviceType.CPU and not event.is_async]
    steps = union(_ranges(host, STEP))
    count = len(_ranges(host, STEP))
    assert count, "no step was recorded"
    talking = common(union(_ranges(host, COMMUNICATION) + _exposed(events)), steps)
    seconds = {COMMUNICATION: length(talking)}
    for phase in PHASES:
        seconds[phase] = length(minus(common(union(_ranges(host, phase)), steps), talking))
    seconds[REST] = length(steps) - sum(seconds.values())
    parts = {part: seconds[part] / 1e6 / count for part in PARTS}
    return Breakdown(parts, _operators(host, steps, count))


def _ranges(host: Sequence[Any], name: str) -> Intervals:
    return [(event.time_range.start, event.time_range.end) for event in host if event.name == MARK + name]


def _exposed(events: Iterable[Any]) -> Intervals:
    """While a GPU runs NCCL's kernels and no other."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    sides: tuple[Intervals, Intervals] = ([], [])
    for event in kernels:
        sides["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    return minus(union(sides[True]), union(sides[False]))


def _operators(host: Sequence[Any], steps: Intervals, count: int) -> list[Operator]:
    """By the device's time where a GPU did the work, by the host's elsewhere."""
    starts = [start for start, _ in steps]
    on_device = any(event.self_device_time_total for event in host)
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in host:
        place = bisect_right(starts, event.time_range.start) - 1
        if event.is_user_annotation or place < 0 or event.time_range.end > steps[place][1]:
            continue
        own = found[_plain(event.name)]
        own[0] += event.self_device_time_total if on_device else event.self_cpu_time_total
        own[1] += 1
    made = [Operator(name, time / 1e6 / count, calls / count) for name, (time, calls) in found.items()]
    return sorted(made, key=lambda operator: -operator.seconds)[:LONGEST]


def _plain(name: str) -> str:
    """A graph of torch.compile goes by a hash: its own time is that of its fused loops."""
    return re.sub(r"^## Call CompiledFxGraph (\w{1,6})\w* ##$", r"fused loops of compiled graph \1", name)


# -- intervals -------------------------------------------------------------------------------------------------------


def union(intervals: Intervals) -> Intervals:
    joined: Intervals = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def minus(ours: Intervals, others: Intervals) -> Intervals:
    """What of `ours` lies in none of `others`; both as `union` gives them."""
    left: Intervals = []
    first = 0
    for start, end in ours:
        while first < len(others) and others[first][1] <= start:
            first += 1
        for other_start, other_end in others[first:]:
            if other_start >= end:
                break
            if start < other_start:
                left.append((start, other_start))
            start = max(start, other_end)
        if start < end:
            left.append((start, end))
    return left


def common(ours: Intervals, others: Intervals) -> Intervals:
    return minus(ours, minus(ours, others))


def length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)


# -- for people ------------------------------------------------------------------------------------------------------


def table(everyone: Sequence[Breakdown], first: int, last: int) -> list[str]:
    """Lines that tell it: the mean over the ranks and, of several, the least and the most. Operators are rank 0's."""
    count = len(everyone)
    ranks = f", {count} ranks" if count > 1 else ""
    rows = {part: [ours.parts[part] for ours in everyone] for part in PARTS}
    rows[STEP] = [sum(ours.parts.values()) for ours in everyone]
    step = sum(rows[STEP])
    lines = [f"where a step's time goes (mean of steps {first} to {last}{ranks}; the profiler's own cost is in it)"]
    lines.append(f"  {'':<14}{'ms':>10}{'%':>8}" + (f"{'least':>10}{'most':>10}" if count > 1 else ""))
    for name, seconds in rows.items():
        spread = f"{min(seconds) * 1e3:>10,.2f}{max(seconds) * 1e3:>10,.2f}" if count > 1 else ""
        lines.append(f"  {name:<14}{sum(seconds) / count * 1e3:>10,.2f}{sum(seconds) / step:>8.1%}{spread}")
    lines.append(f"the {LONGEST} longest operators" + (" of rank 0" if count > 1 else ""))
    lines.append(f"  {'':<52}{'ms':>10}{'calls':>8}")
    lines += [f"  {name[:50]:<52}{time * 1e3:>10,.2f}{calls:>8,.0f}" for name, time, calls in everyone[0].operators]
    return lines
