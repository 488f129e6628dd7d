"""Which shards of tokens a run reads, and how."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.layout import Problem
from pretrain.config.section import Section, meaning


class DataConfig(Section):
    """Shards made by `prepare`; the tokenizer travels with them. Or files of labelled examples."""

    train: str | list[str] = meaning(
        "shards/train", "folder of shards to train on, or a list of folders; or a file of labelled examples"
    )
    weights: list[float] | None = meaning(None, "share of samples from each train folder; null: by their sizes")
    validation: str | None = meaning(None, "folder of held-out shards, or file of examples; null: no validation")
    seq_length: int = meaning(256, "tokens a training sequence; of labelled examples the most", ge=1)
    seed: int | None = meaning(None, "of the data's order; null: run.seed", ge=0, lt=2**63)
    lanes: int = meaning(256, "the shuffle's parallel lanes through the data; part of the data's order", ge=1)
    window: int = meaning(16, "chunks of a lane that are mixed at a time; part of the data's order", ge=1)
    prefetch: int = meaning(2, "batches read ahead of the training loop", ge=1)

    def problems(self) -> Iterator[Problem]:
        folders, weights = self.train_folders, self.weights
        if not folders:
            yield Problem("train", "is empty", "name at least one folder of shards")
        if weights is not None and len(weights) != len(folders):
            yield Problem("weights", f"{len(weights)} for {len(folders)} train folders", "give one a folder, or null")
        if weights is not None and any(weight <= 0 for weight in weights):
            yield Problem("weights", f"{weights}: each must be above 0", "leave a folder out instead")

    @property
    def train_folders(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else self.train
