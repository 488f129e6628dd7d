"""Span corruption (Raffel et al. 2020, "T5", section 3.1.4 and the authors' `random_spans_noise_mask`).

A share of the tokens is cut out in spans. The source is the rest, with a sentinel in the place of each span; the target is
the spans, each behind its sentinel. Both end with the document end. How many tokens and spans there are depends on the
sequence's length alone; where they lie is drawn: the cut-out tokens fall into spans, and the others into as many runs, in
all ways with equal chance, and a sample begins with a run and ends with a span. So of a row's text and its filler as large a
share is cut out; what is filler counts for nothing, nor do the sentinels of spans that begin there.

Shapes: B batch, L tokens of a sample, M source, S target, K spans.
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
from pretrain.objectives.pairs import documents_of, paired

SPANS, RUNS = range(2)  # sites: what is drawn


class SpanCorruption:
    """Makes a micro-batch: a pure function of sample numbers, their tokens, the seed and the configuration."""

    terms = ("loss",)
    num_sums = 2  # beside the loss how many are right
    predicts_text = False
    also: Any = None

    def __init__(self, config: ObjectiveConfig, sentinels: Tensor, eos: int, seed: int, rows: bool = False) -> None:
        """sentinels (>= K,) int64: ids, of the first span first; rows: whether samples are rows that may hold filler."""
        self.config, self.sentinels, self.eos, self.seed, self.rows = config, sentinels, eos, seed, rows

    def __call__(self, numbers: Tensor, tokens: Tensor) -> PairBatch:
        """numbers (B,) int64; tokens (B, L + 1) int64, of which the last is left out."""
        text = tokens[:, :-1]
        cut = self.noise_mask(numbers, text.shape[1])
        begins = cut & ~F.pad(cut[:, :-1], (1, 0))
        span = begins.cumsum(dim=1) - 1  # the span that a place is in, or that was last
        source = self._gather(text, ~cut | begins, begins, span)
        # Each place twice, as the sentinel before it and as itself.
        twice = torch.stack((begins, cut), dim=2).flatten(1)
        marks = torch.stack((begins, torch.zeros_like(cut)), dim=2).flatten(1)
        targets = self._gather(text.repeat_interleave(2, 1), twice, marks, span.repeat_interleave(2, 1))
        documents, gone = None, filler(text, self.eos)
        if self.rows or not self.config.attention_across_documents:
            of = gone.long() if self.config.attention_across_documents else documents_of(text, self.eos)
            documents = self._end(_kept(of, ~cut | begins)), self._end(_kept(of.repeat_interleave(2, 1), twice))
        source, targets = F.pad(source, (0, 1), value=self.eos), F.pad(targets, (0, 1), value=self.eos)
        keys = noise.sample_keys(self.seed, numbers)
        counted = self._end(_kept(~gone.repeat_interleave(2, 1), twice))
        return paired(source, targets, counted, documents, keys, self.eos)

    def noise_mask(self, numbers: Tensor, length: int) -> Tensor:
        """(B, L) bool: which tokens are cut out."""
        count, spans = self.config.spans(length)
        keys = noise.sample_keys(noise.key(self.seed, "spans"), numbers)
        runs = torch.stack((_parts(keys, RUNS, length - count, spans), _parts(keys, SPANS, count, spans)), dim=2)
        ends = runs.flatten(1).cumsum(dim=1)  # of run, span, run, span, ...
        places = torch.arange(length).expand(len(numbers), -1).contiguous()
        return torch.searchsorted(ends, places, right=True) % 2 == 1

    def _gather(self, text: Tensor, kept: Tensor, marks: Tensor, span: Tensor) -> Tensor:
        """The tokens at the places that are kept, at marks the span's sentinel: of every row as many."""
        return _kept(torch.where(marks, self.sentinels[span.clamp(min=0)], text), kept)

    def _end(self, of_tokens: Tensor) -> Tensor:
        """The end at the end of a side is of the last token's document, and counts if that does."""
        return torch.cat((of_tokens, of_tokens[:, -1:]), dim=1)


def _kept(x: Tensor, kept: Tensor) -> Tensor:
    return x[kept].view(len(x), -1)


def _parts(keys: Tensor, site: int, total: int, parts: int) -> Tensor:
    """(B, parts) lengths, each at least 1, that sum to `total`; every way has the same chance."""
    places = torch.arange(total - 1)
    drawn = noise.bits(keys, site, places) * total + places  # no two are the same
    cuts = drawn.topk(parts - 1, dim=1, sorted=False).indices.sort(dim=1).values + 1
    edges = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=total)
    return edges.diff(dim=1)
