"""Which shards of tokens a run reads, and how."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.layout import Problem
from pretrain.config.duration import Interval
from pretrain.config.remote import CacheConfig, RemoteConfig
from pretrain.config.section import Section, meaning

MOST_PHASES = 6  # before the last: torch.compile keeps 8 graphs of a model, one a length and one of validation


class Phase(Section):
    """Steps at the start of a run on shorter sequences (Devlin et al. 2018, A.2: 90% of them at 128 tokens of 512)."""

    seq_length: int = meaning(..., "tokens a training sequence while the phase lasts", ge=1)
    length: Interval = meaning(..., "of the phase, in steps or tokens; the next one follows")
    batch_size: int | None = meaning(None, "sequences a step over all ranks while it lasts; null: batch.size", ge=1)
    micro_size: int | None = meaning(None, "as batch.micro_size, while it lasts; null: batch.micro_size", ge=1)

    def problems(self) -> Iterator[Problem]:
        if self.length.unit == "epochs":
            yield Problem("length", f"{self.length}: a phase is not in epochs", "give steps or tokens")


class DataConfig(Section):
    """Shards made by `prepare`; the tokenizer travels with them. Or files of labelled examples."""

    train: str | list[str] = meaning(
        "shards/train",
        "folder of shards to train on (or its s3://, gs://, http(s):// address), or a list; or a file of labelled examples",
    )
    weights: list[float] | None = meaning(None, "share of samples from each train folder; null: by their sizes")
    validation: str | None = meaning(None, "folder of held-out shards, or file of examples; null: no validation")
    seq_length: int = meaning(256, "tokens a training sequence; of labelled examples the most", ge=1)
    phases: list[Phase] = meaning(
        [],
        "before data.seq_length shorter sequences, each {seq_length, length, batch_size, micro_size}; not of validation",
    )
    seed: int | None = meaning(None, "of the data's order; null: run.seed", ge=0, lt=2**63)
    lanes: int = meaning(256, "the shuffle's parallel lanes through the data; part of the data's order", ge=1)
    window: int = meaning(16, "chunks of a lane that are mixed at a time; part of the data's order", ge=1)
    prefetch: int = meaning(2, "batches read ahead of the training loop", ge=1)
    cache: CacheConfig = meaning(
        CacheConfig(), "of chunks of shards at addresses, on each node; of all its ranks and runs"
    )
    remote: RemoteConfig = meaning(RemoteConfig(), "how shards at addresses are reached")

    def problems(self) -> Iterator[Problem]:
        folders, weights = self.train_folders, self.weights
        if not folders:
            yield Problem("train", "is empty", "name at least one folder of shards")
        if weights is not None and len(weights) != len(folders):
            yield Problem("weights", f"{len(weights)} for {len(folders)} train folders", "give one a folder, or null")
        if weights is not None and any(weight <= 0 for weight in weights):
            yield Problem("weights", f"{weights}: each must be above 0", "leave a folder out instead")
        for number, phase in enumerate(self.phases):
            if phase.seq_length > self.seq_length:
                found = (
                    f"{phase.seq_length} is longer than data.seq_length {self.seq_length}, which is to be the longest"
                )
                yield Problem(f"phases.{number}.seq_length", found, "lower it, or raise data.seq_length")
        if len(self.phases) > MOST_PHASES:
            yield Problem("phases", f"{len(self.phases)} are too many", f"give at most {MOST_PHASES}")

    @property
    def train_folders(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else self.train
