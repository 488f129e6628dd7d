"""Validation during training: the mean loss over the held-out data, the same number under every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
    sources: Mapping[str, Result] | None = None  # of each named source's own held-out text

    @property
    def criterion(self) -> float:
        return self.loss if self.error is None else self.error

    @property
    def words(self) -> str:
        """For people."""
        more = [f"{name.replace('_', ' ')} {score:.4f}" for name, score in self.scores.items()]
        floor = [f"{name.replace('_', ' ')} {score:.4f}" for name, score in (self.floor or {}).items()]
        more[-1:] = [f"{more[-1]} (without learning: {', '.join(floor)})"] if floor else more[-1:]
        more += [] if self.bits_per_byte is None else [f"{self.bits_per_byte:.3f} bits a byte"]
        more += [f"{name} {one.loss:.4f}" for name, one in (self.sources or {}).items()]
        return ", ".join([f"validation loss {self.loss:.4f}", *more])

    @property
    def by_source(self) -> dict[str, dict[str, dict[str, float]]]:
        """Of each named source its loss and bits per byte, as a field of metrics; nothing where there are none."""
        found = {name: one.measures for name, one in (self.sources or {}).items()}
        return {"sources": found} if found else {}

    @property
    def measures(self) -> dict[str, float]:
        """The loss, and bits per byte where they are known."""
        return {
            "validation_loss": self.loss,
            **({} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}),
        }


class Sums(NamedTuple):
    """What a validation adds up."""

    sums: list[float]  # of the terms' losses, then of how many of each are right
    counts: list[float]  # targets of each term


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
        return result_of(self.objective, *self.sums(schedule), self.stream)

    def sums(self, schedule: Schedule) -> Sums:
        """Over all ranks. Collective."""
        terms = self.objective.terms
        sums = torch.zeros(self.objective.num_sums, dtype=torch.float64, device=self.grid.device)
        counts = torch.zeros(len(terms), dtype=torch.float64, device=self.grid.device)
        for batches in self._groups():
            sums += schedule.run(batches, scale=1.0, forward_only=True).double()
            counts += torch.stack([batch.counts() for batch in batches]).sum(dim=0)
        ours = [sums * self.grid.reads_loss, counts * self.grid.reads_data]
        total, count = self.grid.total(torch.cat(ours)).split([len(sums), len(counts)])
        return Sums(total.tolist(), count.tolist())

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


class SourcesValidation:
    """The held-out text of each named source by itself, and beside it the whole: `whole` where the run has held-out text of its
    own, else what all sources' have together, each target counted alike."""

    def __init__(self, parts: Mapping[str, Validation], whole: Validation | None) -> None:
        self.parts, self.whole = parts, whole

    def run(self, schedule: Schedule) -> Result:
        """As `Validation.run`."""
        sums = {name: part.sums(schedule) for name, part in self.parts.items()}
        results = {name: result_of(part.objective, *sums[name], part.stream) for name, part in self.parts.items()}
        whole = self._together(sums, results) if self.whole is None else self.whole.run(schedule)
        return whole._replace(sources=results)

    def _together(self, sums: Mapping[str, Sums], results: Mapping[str, Result]) -> Result:
        added = Sums(
            *([sum(column) for column in zip(*rows, strict=True)] for rows in zip(*sums.values(), strict=True))
        )
        found = result_of(next(iter(self.parts.values())).objective, *added, None)
        return found._replace(bits_per_byte=bits_together(list(results.values())))


def bits_together(results: Sequence[Result]) -> float | None:
    """Bits per byte of several texts as one; None where one's are not known."""
    bits = bytes_of_text = 0.0
    for result in results:
        if not result.bits_per_byte:
            return None
        these = result.loss / math.log(2) * result.targets
        bits, bytes_of_text = bits + these, bytes_of_text + these / result.bits_per_byte
    return bits / bytes_of_text


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
