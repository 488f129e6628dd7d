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
from pretrain.objectives.batch import Batch
from pretrain.objectives.causal import Causal


class Result(NamedTuple):
    loss: float  # nats a target
    bits_per_byte: float  # of the text behind the targets
    targets: int


class Validation:
    """Reads the held-out samples in their order; each data-parallel rank takes every so-manieth micro-batch.

    Every rank runs the same number of micro-batches of the same shape; what is missing in the last ones is masked.
    """

    def __init__(self, config: Config, grid: Grid, objective: Causal, stream: Stream) -> None:
        self.config, self.grid, self.objective, self.stream = config, grid, objective, stream
        wanted = config.monitor.validation_samples
        self.samples = min(wanted or stream.samples_per_epoch, stream.samples_per_epoch)

    def run(self, schedule: Schedule) -> Result:
        loss = torch.zeros((), dtype=torch.float64, device=self.grid.device)
        targets = torch.zeros_like(loss)
        for batches in self._groups():
            loss += schedule.run(batches, scale=1.0, forward_only=True).double()
            targets += sum(batch.mask.sum(dtype=torch.float64) for batch in batches)
        nothing = torch.zeros_like(loss)
        ours = torch.stack([loss if self.grid.reads_loss else nothing, targets if self.grid.reads_data else nothing])
        total, count = self.grid.total(ours).tolist()
        manifest = self.stream.manifests[0]
        tokens_per_byte = manifest.tokens / max(manifest.text_bytes, 1)
        mean = total / max(count, 1.0)
        return Result(mean, mean / math.log(2) * tokens_per_byte, int(count))

    def _groups(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches, in groups as a pipeline takes them."""
        micro, ranks, stages = self.config.batch.micro_size, self.grid.data_size, self.grid.layout.pipeline
        rounds = -(-self.samples // (micro * ranks * stages)) * stages
        starts = [(turn * ranks + self.grid.data_rank) * micro for turn in range(rounds)]
        for first in range(0, rounds, stages):
            yield [self._batch(start, micro) for start in starts[first : first + stages]]

    def _batch(self, start: int, size: int) -> Batch:
        """Samples start : start + size, those past the end repeated from the first but masked."""
        numbers = np.arange(start, start + size)
        past = numbers >= self.samples
        known = np.where(past, 0, numbers)
        batch = self.objective(torch.from_numpy(known), torch.from_numpy(self.stream.read(known)))
        mask = batch.mask * torch.from_numpy(~past).to(batch.mask.dtype)[:, None]
        return batch._replace(mask=mask).to(self.grid.device)
