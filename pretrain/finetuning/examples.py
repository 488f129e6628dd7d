"""Labelled examples in memory, in an order that is a function of (file, settings, seed, sample number).

An epoch is a keyed permutation of the samples. Inside pools of POOL samples they are sorted by length and cut into groups of
GROUP, which are then shuffled: a batch holds samples of like length, so little is padded, and every sample is used exactly
once an epoch. Nothing depends on the batch size.

As tokens a sample is planes of integers, padded to the widest of those read together: for each of its rows ids (-1 where
there is none), segments, and targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.order import key, permute
from pretrain.errors import UserError
from pretrain.finetuning.sequences import Array, Format
from pretrain.finetuning.tasks import Sample, Task
from pretrain.tasks.alignment import IGNORED
from pretrain.tasks.lines import Findings

POOL, GROUP = 1024, 32
NOTHING = -1  # an id where there is none


class Examples(NamedTuple):
    """A file's items and their samples."""

    path: Path
    items: list[Any]
    samples: list[Sample]
    findings: Findings

    @classmethod
    def read(cls, task: Task, path: Path, items: list[Any], findings: Findings) -> Examples:
        made = [sample for number, item in enumerate(items) for sample in task.samples(number, item, path, findings)]
        return cls(path, items, made, findings)

    @property
    def digest(self) -> str:
        """SHA-256 of all samples."""
        found = hashlib.sha256()
        for sample in self.samples:
            for part in (*(array for row in sample.rows for array in (row.ids, row.segments)), sample.targets):
                found.update(len(part).to_bytes(8, "little"))
                found.update(np.ascontiguousarray(part, "<i8").tobytes())
        return found.hexdigest()


def planes(samples: Many[Sample], num_rows: int, form: Format) -> Array:
    """(n, 3 num_rows, W) int64: of each row ids, segments, targets; W fits all of them."""
    widest = max(max(len(row.ids) for sample in samples for row in sample.rows), *(len(s.targets) for s in samples))
    out = np.zeros((len(samples), 3 * num_rows, form.width(widest)), np.int64)
    out[:, 0::3] = NOTHING
    out[:, 2::3] = IGNORED
    for place, sample in enumerate(samples):
        for number, row in enumerate(sample.rows):
            out[place, 3 * number, : len(row.ids)] = row.ids
            out[place, 3 * number + 1, : len(row.segments)] = row.segments
        out[place, 2, : len(sample.targets)] = sample.targets
    return out


class GroupedOrder:
    """Sample number -> place of the sample."""

    def __init__(self, lengths: Array, seed: int) -> None:
        self.lengths, self.seed = lengths, seed
        self._epoch = -1
        self._order: Array = np.empty(0, np.int64)

    def locate(self, numbers: Array) -> tuple[Array, Array]:
        """As `pretrain.data.order.Order.locate`: (zeros, places), each (B,)."""
        epochs, within = np.divmod(numbers, len(self.lengths))
        places = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = self._of_epoch(int(epoch))[within[here]]
        return np.zeros_like(places), places

    def _of_epoch(self, epoch: int) -> Array:
        if epoch != self._epoch:
            self._order, self._epoch = np.concatenate(list(self._pools(epoch))), epoch
        return self._order

    def _pools(self, epoch: int) -> Iterator[Array]:
        count = len(self.lengths)
        shuffled = permute(np.arange(count), count, key(self.seed, 11, epoch))
        for number, start in enumerate(range(0, count, POOL)):
            pool = shuffled[start : start + POOL]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            groups = -(-len(pool) // GROUP)
            order = permute(np.arange(groups), groups, key(self.seed, 12, epoch, number))
            # The last group may be short: it stays where a batch that divides the pool would have it, at the end.
            whole = [place for place in order.tolist() if (place + 1) * GROUP <= len(pool)]
            rest = [place for place in range(groups) if (place + 1) * GROUP > len(pool)]
            yield np.concatenate([pool[place * GROUP : (place + 1) * GROUP] for place in [*whole, *rest]])


class ExampleStream:
    """Examples as the training loop reads them: what `pretrain.data.stream.Stream` is for shards."""

    lanes = 1
    row = 0  # as of shards, where a read may be held

    def __init__(self, task: Task, examples: Examples, seed: int) -> None:
        self.task, self.examples = task, examples
        if not examples.samples:
            raise UserError(f"{examples.path}: there is nothing to train on in it")
        lengths = np.array([max(len(row.ids) for row in sample.rows) for sample in examples.samples], np.int64)
        self.order = GroupedOrder(lengths, seed)
        self.recipe = {
            "examples": examples.digest,
            "labels": list(task.labels.names),
            "kind": task.config.kind,
            "order": [1, POOL, GROUP],
            "seed": seed,
        }

    @property
    def samples_per_epoch(self) -> int:
        return len(self.examples.samples)

    @property
    def findings(self) -> list[str]:
        """None: those of the examples are told with their file."""
        return []

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what a sample number is."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()

    def expect(self, sources: Array, places: Array) -> None:
        """Nothing: all examples are in memory."""

    def stalled(self, seconds: float) -> str:
        """Nothing: no read can hang."""
        return ""

    def gather(self, sources: Array, places: Array, numbers: Array | None = None) -> Array:
        """Planes of the samples at `places` (B,)."""
        samples = [self.examples.samples[place] for place in places.tolist()]
        return planes(samples, self.task.num_rows, self.task.form)

    def where(self, source: int, place: int) -> str:
        """Of a sample, for people."""
        return f"{self.examples.path}, sample {place}"

    def unpadded(self, tokens: Array) -> list[Array]:
        """Planes (3 num_rows, W) of samples without what they were padded with, which depends on who reads them together."""
        filled = (tokens[:, 0::3] != NOTHING).any(axis=1) | (tokens[:, 2::3] != IGNORED).any(axis=1)
        widths = filled.shape[1] - filled[:, ::-1].argmax(axis=1)
        return [sample[:, :width] for sample, width in zip(tokens, widths.tolist(), strict=True)]

    def close(self) -> None: ...
