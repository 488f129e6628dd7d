"""Validation during training: the mean loss over the held-out data, the same number under every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from parallel.grid import Grid
from parallel.schedules import Schedule
from pretrain.config.run import Config
from pretrain.data.stream import Stream
from pretrain.objectives.batch import TextBatch
from pretrain.objectives.choice import TextObjective


class Result(NamedTuple):
    loss: float  # nats a target, the sum of the terms' means
    bits_per_byte: float | None  # of the text behind the targets; None where these are but a part of it
    targets: int  # of the first term
    scores: dict[str, float]  # what else was measured: accuracies, and the terms' losses where there are several
    error: float | None = None  # by which the best step is chosen, the lower the better; None: by the loss
    floor: dict[str, float] | None = None  # those of the scores that are reached without learning

    @property
    def criterion(self) -> float:
        return self.loss if self.error is None else self.error


class Validation:
    """Reads the held-out samples in their order; each data-parallel rank takes every so-manieth micro-batch.

    Every rank runs the same number of micro-batches of the same shape; what is missing in the last ones is masked.
    """

    def __init__(self, config: Config, grid: Grid, objective: TextObjective, stream: Stream) -> None:
        self.config, self.grid, self.objective, self.stream = config, grid, objective, stream
        wanted = config.monitor.validation_samples
        self.samples = min(wanted or stream.samples_per_epoch, stream.samples_per_epoch)

    def run(self, schedule: Schedule) -> Result:
        """`schedule` drives stages that are not training."""
        terms = self.objective.terms
        sums = torch.zeros(self.objective.num_sums, dtype=torch.float64, device=self.grid.device)
        counts = torch.zeros(len(terms), dtype=torch.float64, device=self.grid.device)
        for batches in self._groups():
            sums += schedule.run(batches, scale=1.0, forward_only=True).double()
            counts += torch.stack([batch.counts() for batch in batches]).sum(dim=0)
        ours = [sums * self.grid.reads_loss, counts * self.grid.reads_data]
        total, count = self.grid.total(torch.cat(ours)).split([len(sums), len(counts)])
        return result_of(self.objective, total.tolist(), count.tolist(), self.stream)

    def _groups(self) -> Iterator[list[TextBatch]]:
        """This rank's micro-batches, in groups as a pipeline takes them."""
        micro, ranks, stages = self.config.batch.micro_size, self.grid.data_size, self.grid.layout.pipeline
        rounds = -(-self.samples // (micro * ranks * stages)) * stages
        starts = [(turn * ranks + self.grid.data_rank) * micro for turn in range(rounds)]
        for first in range(0, rounds, stages):
            yield [self._batch(start, micro) for start in starts[first : first + stages]]

    def _batch(self, start: int, size: int) -> TextBatch:
        """Samples start : start + size, those past the end repeated from the first but masked."""
        numbers = np.arange(start, start + size)
        past = numbers >= self.samples
        known = np.where(past, 0, numbers)
        batch = self.objective(torch.from_numpy(known), torch.from_numpy(self.stream.read(known, self.objective.also)))
        return batch.without(torch.from_numpy(past)).to(self.grid.device)


def result_of(objective: TextObjective, sums: list[float], counts: list[float], stream: Stream | None) -> Result:
    """sums: of the terms' losses, then of how many of each are right; counts: the terms' targets; stream: whose text the
    targets are of, for bits per byte."""
    means = [one / max(count, 1.0) for one, count in zip(sums, [*counts, *counts], strict=False)]
    terms, loss = objective.terms, sum(means[: len(objective.terms)])
    bits = None
    if objective.predicts_text and stream is not None:
        manifest = stream.manifests[0]
        bits = loss / math.log(2) * (manifest.tokens - manifest.padding) / max(manifest.text_bytes, 1)
    scores = {f"{name}_loss": mean for name, mean in zip(terms, means, strict=False)} if len(terms) > 1 else {}
    scores |= {accuracy_of(name): mean for name, mean in zip(terms, means[len(terms) :], strict=False)}
    return Result(loss, bits, int(counts[0]), scores)


def accuracy_of(term: str) -> str:
    """The name of a term's accuracy."""
    return "accuracy" if term == "loss" else f"{term}_accuracy"
