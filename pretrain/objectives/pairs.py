"""What an encoder-decoder learns from pairs of a source and a target, and from text cut in two.

The decoder reads the target moved one place to the right: before a target's first token stands the document end, which is
also what ends it. So of targets that are packed into one row each begins with the end of the one before.

All of it is a function of (seed, sample number, tokens): nothing depends on the batch that a sample is in.

Shapes: B batch, M source, S target.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import noise
from pretrain.config.objective import ObjectiveConfig
from pretrain.objectives.batch import PairBatch
from pretrain.objectives.filler import filler


def paired(
    source: Tensor, targets: Tensor, mask: Tensor, documents: tuple[Tensor, Tensor] | None, keys: Tensor, eos: int
) -> PairBatch:
    """source (B, M), targets and mask (B, S), documents of both (or None), keys (B,): as the model takes them."""
    read = F.pad(targets[:, :-1], (1, 0), value=eos)
    numbers = None if documents is None else torch.cat(documents, dim=1).to(torch.int32)
    return PairBatch(torch.cat((source, read), dim=1), targets, mask.to(torch.float32), keys, numbers)


class SequenceToSequence:
    """Rows of packed pairs, as `prepare --pairs` makes them: M tokens of sources, S of targets, pair n of either side ended
    by the n-th document end. The rest of a side is filled with document ends, which are neither read nor predicted."""

    terms = ("loss",)
    num_sums = 2  # beside the loss how many are right
    predicts_text = False
    also: Any = None

    def __init__(self, config: ObjectiveConfig, eos: int, seed: int) -> None:
        self.config, self.eos, self.seed = config, eos, seed

    def __call__(self, numbers: Tensor, tokens: Tensor) -> PairBatch:
        """numbers (B,) int64; tokens (B, M + S + 1) int64, of which the last is not of the row."""
        source, targets = tokens[:, :-1].split(self.config.lengths(tokens.shape[1] - 1), dim=1)
        (of_source, read), (of_target, counted) = self._documents(source), self._documents(targets)
        # What fills a side is of no document: numbers behind all others, another for either side.
        last = tokens.shape[1]
        documents = torch.where(read, of_source, last), torch.where(counted, of_target, last + 1)
        return paired(source, targets, counted, documents, noise.sample_keys(self.seed, numbers), self.eos)

    def _documents(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """Of one side (B, L): its pairs' numbers, and which tokens are a pair's. An end behind an end is of none."""
        ends = side == self.eos
        before = F.pad(ends[:, :-1], (1, 0), value=True)
        return ends.cumsum(dim=1) - ends.long(), ~(ends & before)


class Prefix:
    """Text whose first part the encoder reads and whose rest the decoder predicts, cut at one place for all samples (Raffel
    et al. 2020, section 3.2.1; of UL2, Tay et al. 2022, the S-denoiser). Filler that the encoder reads disturbs nothing: where
    it does, all that the decoder would predict is filler too."""

    terms = ("loss",)
    num_sums = 2
    predicts_text = True
    also: Any = None

    def __init__(self, config: ObjectiveConfig, eos: int, seed: int) -> None:
        self.config, self.eos, self.seed = config, eos, seed

    def __call__(self, numbers: Tensor, tokens: Tensor) -> PairBatch:
        """numbers (B,) int64; tokens (B, M + S + 1) int64, of which the last is left out."""
        text = tokens[:, :-1]
        lengths = self.config.lengths(text.shape[1])
        source, targets = text.split(lengths, dim=1)
        documents = None if self.config.attention_across_documents else documents_of(text, self.eos).split(lengths, 1)
        keys = noise.sample_keys(self.seed, numbers)
        counted = ~filler(text, self.eos)[:, lengths[0] :]
        return paired(source, targets, counted, documents, keys, self.eos)  # type: ignore[arg-type]


def documents_of(text: Tensor, eos: int) -> Tensor:
    """Numbers (B, L) of the documents of text (B, L), each ended by its last token."""
    ends = text == eos
    return ends.cumsum(dim=1) - ends.long()
