"""Causal language modelling: each position predicts the next token (Radford et al. 2018)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kernels import noise
from pretrain.objectives.batch import Batch
from pretrain.objectives.filler import filler


class CausalConfig(Protocol):
    """What the objective needs of its configuration."""

    @property
    def loss_across_documents(self) -> bool:
        """Whether the first token of a document counts in the loss (predicted from the end of the one before)."""

    @property
    def attention_across_documents(self) -> bool:
        """Whether a position also sees the documents before its own in the sequence."""


class Causal:
    """Makes a micro-batch: a pure function of sample numbers, their tokens, the seed and the configuration."""

    terms = ("loss",)  # of the loss, each the mean over its own targets
    num_sums = 1  # that the model gives while it is validated
    predicts_text = True  # every target is a token of the text, so that bits per byte can be told

    def __init__(self, config: CausalConfig, eos: int, seed: int, rows: bool = False) -> None:
        """rows: whether samples are rows that were packed, so that what is behind a row's last token does not follow it."""
        self.loss_across, self.attention_across = config.loss_across_documents, config.attention_across_documents
        self.eos, self.seed, self.rows = eos, seed, rows
        self.also = None  # a sample's own tokens are enough

    def __call__(self, numbers: Tensor, tokens: Tensor) -> Batch:
        """numbers (B,) int64; tokens (B, S + 1) int64. Inputs are the first S, targets the last S of each row."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        ends = inputs == self.eos
        counted = torch.ones_like(ends) if self.loss_across else ~ends
        counted &= ~filler(tokens, self.eos)[:, 1:]
        if self.rows:
            counted[:, -1] = False
        # A document's end is its last token.
        documents = None if self.attention_across else (ends.cumsum(dim=1) - ends.long()).to(torch.int32)
        return Batch(inputs, targets, counted.to(torch.float32), noise.sample_keys(self.seed, numbers), documents)
