"""The bare loop: the same model and optimizer without the engine, its data in memory; and the engine's speed against it.

One process alternates: some steps of the engine at ZeRO-0, as many of the bare loop, from the same initial weights and on
the same samples. Both losses are told, so that nobody need believe that the two did the same work.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from workload import layout_overrides, start_run, steps

from parallel.engine import adamw
from parallel.initial import initialise
from parallel.layers import Parts
from pretrain.build import optimizer_options
from pretrain.data.stream import prefetch
from pretrain.models.gpt import GPT
from pretrain.objectives.batch import AnyBatch
from pretrain.train import Run

HELD = 16  # steps of samples that the bare loop keeps in memory, and goes through again


def bare_steps(run: Run, losses: list[float] | None = None) -> Iterator[float]:
    """Train for ever a model of the run's config on its first samples; the seconds of each step."""
    config = run.config
    model = GPT(config.model, Parts(), run.sources.vocabulary.size, config.data.seq_length)
    initialise(model, config.run.seed)
    forward = torch.compile(model.forward, dynamic=False) if config.precision.compile == "always" else model
    options = optimizer_options(config)
    optimizer = adamw(model.parameters(), options)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.learning_rate
    held = list(_held(run))
    started = time.perf_counter()
    for batches, targets in itertools.cycle(held):
        total = torch.zeros(())
        for batch in batches:
            loss = forward(*batch)
            (loss / targets).backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if losses is not None:
            losses.append(float(total) / targets)
        now = time.perf_counter()
        yield now - started
        started = time.perf_counter()


def _held(run: Run) -> Iterator[tuple[list[AnyBatch], float]]:
    """Micro-batches and the count of targets of the first steps."""
    micro = run.config.batch.micro_size
    source = prefetch(run.sources.train, run.plan.steps_from(0), 0, 1, 2)
    for numbers, tokens in itertools.islice(source, HELD):
        rows = zip(torch.from_numpy(numbers).split(micro), torch.from_numpy(tokens).split(micro), strict=True)
        batches = [run.objective(*row) for row in rows]
        yield batches, float(sum(batch.mask.sum() for batch in batches))
    source.close()


class _Watched(Run):
    """The run, and its last loss as it would be logged."""

    losses: list[float]

    def log(self, data: Any, loss: Any, update: Any) -> None:
        super().log(data, loss, update)
        self.losses.append(loss.item() / data.targets[0])


def compare_speed(config: str, rounds: int, count: int) -> dict[str, Any]:
    """In a rank alone: `rounds` of `count` steps of each, in turn; the ratio of the times within each round."""
    run = start_run(config, layout_overrides("zero=0"))
    run.__class__, run.losses = _Watched, []  # type: ignore[attr-defined]
    bare_losses: list[float] = []
    loops = {"engine": steps(run), "bare": bare_steps(run, bare_losses)}
    for loop in loops.values():
        list(itertools.islice(loop, 3))  # compilation, first touches of memory
    times: list[dict[str, float]] = []
    for turn in range(rounds):
        names = list(loops) if turn % 2 == 0 else list(reversed(loops))
        times.append({name: statistics.mean(itertools.islice(loops[name], count)) for name in names})
    slower = [one["engine"] / one["bare"] - 1 for one in times]
    ours = run.losses  # type: ignore[attr-defined]
    parts = [abs(a - b) / b for a, b in zip(ours[:HELD], bare_losses[:HELD], strict=False)]
    return {
        "seconds": times,
        "slower": {"median": statistics.median(slower), "min": min(slower), "max": max(slower)},
        "largest_relative_difference_of_loss": max(parts),
        "compiled": run.built.compiled,
    }
