"""From a model's outputs to predictions and metrics, the same under every layout and batch size: nothing is dropped, nothing
doubled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.grid import Grid
from parallel.schedules import Schedule
from pretrain.config.run import Config
from pretrain.finetuning.examples import Examples, planes
from pretrain.finetuning.sequences import Array
from pretrain.finetuning.tasks import Sample, Task
from pretrain.objectives.labelled import Labelled, LabelledBatch
from pretrain.validation import Result

Outputs = Callable[[LabelledBatch], Tensor]


class Judge:
    """Validation on held-out examples while a task is trained; see `pretrain.validation.Validation`. training: the items
    from which what is reached without learning is taken."""

    def __init__(
        self, config: Config, grid: Grid, task: Task, objective: Labelled, examples: Examples, training: Many[Any]
    ) -> None:
        self.grid, self.task, self.objective, self.examples = grid, task, objective, examples
        self.micro = config.batch.micro_size
        wanted = config.monitor.validation_samples
        self.items = examples.items[:wanted]
        samples = [sample for sample in examples.samples if sample.item < len(self.items)]
        self.samples = sorted(samples, key=length)
        self.floor = task.floor(training, self.items)

    def run(self, schedule: Schedule) -> Result:
        """`schedule` drives stages that are not training. Collective."""
        found: list[tuple[int, Array, float, float]] = []
        for places in self._groups():
            batches = self._batches(places)
            outputs = schedule.outputs([batch.to(self.grid.device) for batch in batches])
            if self.grid.reads_data:
                for part, batch, output in zip(places, batches, outputs, strict=True):
                    found += self._kept(part, batch, output.cpu())
        everyone = {one[0]: one for part in self.grid.from_all(found) for one in part}
        predictions = list(predicted(self.task, self.items, self.samples, {n: one[1] for n, one in everyone.items()}))
        scores = self.task.metrics(self.items, predictions)
        losses, weights = (math.fsum(one[part] for one in everyone.values()) for part in (2, 3))
        loss = losses / max(weights, 1e-30)
        assert self.task.metric is not None
        return Result(loss, None, len(everyone), scores, 1.0 - scores[self.task.metric], self.floor)

    def _groups(self) -> Iterator[list[range]]:
        """This rank's micro-batches as places in `samples`, and past their end, in groups as a pipeline takes them."""
        ranks, stages, count = self.grid.data_size, self.grid.layout.pipeline, len(self.samples)
        rounds = -(-count // (self.micro * ranks * stages)) * stages
        starts = [(turn * ranks + self.grid.data_rank) * self.micro for turn in range(rounds)]
        for first in range(0, rounds, stages):
            yield [range(start, start + self.micro) for start in starts[first : first + stages]]

    def _batches(self, places: list[range]) -> list[LabelledBatch]:
        """Padded together: what goes through a pipeline at once has one shape. Past the end stands the last sample, which
        there counts nothing."""
        last = len(self.samples) - 1
        samples = [self.samples[min(place, last)] for part in places for place in part]
        whole = torch.from_numpy(planes(samples, self.task.num_rows, self.task.form))
        made = [self.objective(torch.arange(len(part)), part) for part in whole.split(self.micro)]
        return [
            batch.without(torch.tensor(part) > last) if part[-1] > last else batch
            for part, batch in zip(places, made, strict=True)
        ]

    def _kept(self, places: range, batch: LabelledBatch, outputs: Tensor) -> Iterator[tuple[int, Array, float, float]]:
        """Of each of the micro-batch's samples that there are: its place, outputs, loss and the loss's weight."""
        losses, weights = sample_losses(self.task, outputs, batch)
        for place, output, loss, weight in zip(places, outputs, losses, weights, strict=True):
            if place < len(self.samples):
                yield place, output.float().numpy(), float(loss), float(weight)


def sample_losses(task: Task, outputs: Tensor, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
    """(B,) float64 sums of the losses of each sample, without smoothing, and of their weights."""
    from pretrain.models.tasks import losses

    found = losses(task.config.kind, outputs.double(), batch.targets, 0.0) * batch.mask
    return found.sum(dim=1), batch.mask.double().sum(dim=1)


def batch_of(objective: Labelled, task: Task, samples: Many[Sample]) -> LabelledBatch:
    numbers = torch.arange(len(samples))
    return objective(numbers, torch.from_numpy(planes(samples, task.num_rows, task.form)))


def predicted(
    task: Task, items: Many[Any], samples: Many[Sample], outputs: dict[int, Array]
) -> Iterator[dict[str, Any]]:
    """A prediction of each item, in order. outputs: of each sample by its place in `samples`."""
    mine: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        mine.setdefault(sample.item, []).append(place)
    for number, item in enumerate(items):
        places = sorted(mine[number], key=lambda place: samples[place].window)
        yield task.prediction(item, [samples[place] for place in places], [outputs[place] for place in places])


@torch.inference_mode()
def outputs_of(outputs: Outputs, objective: Labelled, task: Task, samples: Many[Sample], size: int) -> dict[int, Array]:
    """Of every sample, in batches of like lengths."""
    order = sorted(range(len(samples)), key=lambda place: length(samples[place]))
    found: dict[int, Array] = {}
    for first in range(0, len(order), size):
        part = order[first : first + size]
        result = outputs(batch_of(objective, task, [samples[place] for place in part])).float().cpu().numpy()
        found.update(zip(part, np.asarray(result), strict=True))
    return found


def length(sample: Sample) -> int:
    return max(len(row.ids) for row in sample.rows)
