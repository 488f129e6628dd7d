"""Which shards of tokens a run reads, and how."""

from __future__ import annotations

from pydantic import model_validator

from pretrain.config.section import Section, meaning


class DataConfig(Section):
    """Shards made by `prepare`; the tokenizer travels with them."""

    train: str | list[str] = meaning("shards/train", "folder of shards to train on, or a list of folders")
    weights: list[float] | None = meaning(None, "share of samples from each train folder; null: by their sizes")
    validation: str | None = meaning(None, "folder of held-out shards; null: no validation")
    seq_length: int = meaning(256, "tokens a training sequence", ge=1)
    lanes: int = meaning(256, "the shuffle's parallel lanes through the data; part of the data's order", ge=1)
    window: int = meaning(16, "chunks of a lane that are mixed at a time; part of the data's order", ge=1)
    prefetch: int = meaning(2, "batches read ahead of the training loop", ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if not self.train_folders:
            raise ValueError("train: name at least one folder of shards")
        if self.weights is not None and len(self.weights) != len(self.train_folders):
            raise ValueError(f"weights: {len(self.weights)} weights for {len(self.train_folders)} train folders")
        if self.weights is not None and min(self.weights) <= 0:
            raise ValueError("weights: each must be above 0; leave a folder out instead")
        return self

    @property
    def train_folders(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else self.train
