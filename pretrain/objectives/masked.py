"""Masked language modelling with sentence pairs (Devlin et al. 2018, sections 3.1 and A.1).

A sample's tokens become [CLS] text [SEP], or [CLS] A [SEP] B [SEP] for pairs. Of the text a share is predicted, exactly
that share of each sequence: 80% of those become [MASK], 10% any token, 10% stay.

What is hidden together is a unit: a token, a word, or a span of them whose length is geometric (Joshi et al. 2020,
"SpanBERT", section 3.1). Units are taken in the order of their hashes until the next one would be too many; a span is
replaced as one, tokens and words token by token (as the papers do).

Pairs: A and B are the two sides of a cut through the sample, after the end of a sentence where there is one and never at
the end of a document. `next`: half of the time B is the beginning of another sample instead. `order`: half of the time the
two stand swapped (Lan et al. 2020, "ALBERT", section 3.1). Of S tokens the text takes S - 2, for pairs S - 3: the last two
or three of a sample are left out.

Of rows that were packed the text ends before the document ends at its end: [SEP] stands in the place of the first of them,
what is behind it is filler, which the text never sees, and a pair is cut as the text is long. A pair counts if both of its
segments have text.

All of it is a function of (seed, sample number, tokens): nothing depends on the batch that a sample is in.

Shapes: B batch, S sequence, P places that may be predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import noise
from pretrain.config.objective import ObjectiveConfig
from pretrain.objectives.batch import MaskedBatch
from pretrain.objectives.filler import lengths

UNIT, REPLACE, TOKEN, LENGTH, CUT, SWAP, PARTNER = range(7)  # sites: what is drawn
REACH = 64  # turns of the sample's own lane within which its partner lies
NEVER = 2**62

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Also = Callable[[Numbers], Numbers]


class Symbols(NamedTuple):
    """What the objective needs of the vocabulary."""

    mask: int
    cls: int
    sep: int
    eos: int
    text: Tensor  # (T,) int64: the ids that text has
    joins_left: Tensor  # (V,) bool: may go on with the word before it
    joins_right: Tensor  # (V,) bool: one behind it may go on with its word
    ends_sentence: Tensor  # (V,) bool


class Row(NamedTuple):
    """Samples before anything of them is hidden."""

    row: Tensor  # (B, S) int64 ids
    filler: Tensor  # (B, S) bool
    segments: Tensor  # (B, S) int64
    labels: Tensor | None = None  # (B,) int64: 1 where the second segment does not follow the first
    labelled: Tensor | None = None  # (B,) float32: 1 where the label counts


class Masked:
    """Makes a micro-batch: a pure function of sample numbers, their tokens, the seed and the configuration."""

    predicts_text = False

    def __init__(self, config: ObjectiveConfig, symbols: Symbols, seed: int, lanes: int, rows: bool = False) -> None:
        """lanes: of the order; rows: whether samples are rows that were packed, each filled up behind its text."""
        self.config, self.symbols, self.seed, self.lanes, self.rows = config, symbols, seed, lanes, rows
        self.paired = config.pairs != "none"
        self.terms = ("masked", "pairs") if self.paired else ("masked",)
        self.num_sums = 2 * len(self.terms)  # beside each loss how many are right
        self.also: Also | None = self._partners if config.pairs == "next" else None
        self.is_text = torch.zeros(len(symbols.joins_left), dtype=torch.bool)
        self.is_text[symbols.text] = True
        self.thresholds = span_thresholds(config.span_probability, config.span_limit)

    def _partners(self, numbers: Numbers) -> Numbers:
        """The numbers (B,) of the samples whose tokens are needed as well: of the same lane, so of chunks at hand."""
        drawn = noise.bits(self._keys(torch.from_numpy(numbers)), PARTNER, torch.zeros(1))[:, 0].numpy()
        return numbers + self.lanes * (1 + drawn % REACH)  # type: ignore[no-any-return]

    def __call__(self, numbers: Tensor, tokens: Tensor) -> MaskedBatch:
        """numbers (B,) int64; tokens (B, S + 1) int64, with a partner's (B, 2 (S + 1))."""
        keys = self._keys(numbers)
        made = self._pairs(keys, tokens) if self.paired else self._single(tokens)
        inputs, places, targets, counted = self._hide(keys, made.row)
        return MaskedBatch(
            inputs,
            targets,
            counted,
            noise.sample_keys(self.seed, numbers),
            self._documents(made),
            made.segments,
            places,
            made.labels,
            made.labelled,
        )

    def _documents(self, made: Row) -> Tensor | None:
        """(B, S) numbers; None where every place sees all. Filler is a document of its own."""
        if self.config.attention_across_documents:
            return made.filler.to(torch.int32) if self.rows else None
        ends = made.row == self.symbols.eos
        # A document's end is its last token.
        documents = ends.cumsum(dim=1) - ends.long()
        return torch.where(made.filler, made.row.shape[1], documents).to(torch.int32)

    def _keys(self, numbers: Tensor) -> Tensor:
        return noise.sample_keys(noise.key(self.seed, "masked"), numbers)

    # -- segments ----------------------------------------------------------------------------------------------------

    def _single(self, tokens: Tensor) -> Row:
        """[CLS] text [SEP]."""
        text = tokens[:, :-3]
        row = F.pad(F.pad(text, (1, 0), value=self.symbols.cls), (0, 1), value=self.symbols.sep)
        behind = torch.arange(row.shape[1]) - self._length(text)[:, None] - 1  # the text's end
        row = row.masked_fill(behind == 0, self.symbols.sep).masked_fill(behind > 0, self.symbols.eos)
        return Row(row, behind > 0, torch.zeros_like(row))

    def _length(self, text: Tensor) -> Tensor:
        """How much (B,) of text (B, L) is not filled up: of samples that are no rows all."""
        return lengths(text, self.symbols.eos) if self.rows else torch.full((len(text),), text.shape[1])

    def _pairs(self, keys: Tensor, tokens: Tensor) -> Row:
        """[CLS] A [SEP] B [SEP], and whether B does not follow."""
        partner = self.config.pairs == "next"
        width = tokens.shape[1] // 2 if partner else tokens.shape[1]
        length = width - 4  # S - 3 tokens of text
        text = tokens[:, :length]
        whole = self._length(text)[:, None]
        cut = self._cut(keys, text, whole)[:, None]
        wrong = (noise.bits(keys, SWAP, torch.zeros(1)) >= 2**31).long()  # (B, 1)
        first = cut if partner else torch.where(wrong > 0, whole - cut, cut)  # tokens of the first segment
        first = first.clamp(min=0)
        last = (whole - first).clamp(min=0)  # and of the second
        counted = (lengths(text, self.symbols.eos) > 0) & (whole[:, 0] > 1)
        if partner:  # no longer than what would follow, so that the length tells nothing
            other = tokens[:, width : width + length]
            last = torch.where(wrong > 0, torch.minimum(last, self._length(other)[:, None]), last)
            counted &= (lengths(other, self.symbols.eos) > 0) | (wrong[:, 0] == 0)
        place = torch.arange(length + 3, device=tokens.device)[None]
        within = place - 1, place - first - 2  # places in either segment
        behind = within[1] - last
        if partner:
            source = within[0], torch.where(wrong > 0, width, cut) + within[1]
        else:
            source = within[0] + wrong * cut, within[1] + (1 - wrong) * cut
        second = (place > first + 1).long()
        chosen = torch.where(second > 0, source[1], source[0])
        edge = (place == 0) | (place == first + 1) | (behind == 0)
        row = tokens.gather(1, torch.where(edge | (behind > 0), 0, chosen))
        row = torch.where(edge, torch.where(place == 0, self.symbols.cls, self.symbols.sep), row)
        row = row.masked_fill(behind > 0, self.symbols.eos)
        counted &= ((first > 0) & (last > 0))[:, 0]
        return Row(row, behind > 0, second, wrong[:, 0], counted.float())

    def _cut(self, keys: Tensor, text: Tensor, whole: Tensor) -> Tensor:
        """How many of the first `whole` (B, 1) tokens of text (B, L) are the first segment (B,): between a quarter and three
        quarters."""
        low, high = (whole // 4).clamp(min=1), (whole - whole // 4).clamp(min=2)
        cuts = torch.arange(1, max(2, text.shape[1]))
        before = text[:, : len(cuts)]  # the last token of the first segment, for each cut
        score = noise.bits(keys, CUT, cuts)
        score = score + (self.symbols.ends_sentence[before].long() << 33)
        score = torch.where(before == self.symbols.eos, -1, score)
        return 1 + torch.where((cuts >= low) & (cuts < high), score, -2).argmax(dim=1)

    # -- masking -----------------------------------------------------------------------------------------------------

    def _hide(self, keys: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of row (B, S): inputs (B, S); places, targets and what of them counts (B, P)."""
        length = row.shape[1]
        count = self.config.predicted(length)
        text = self.is_text[row]
        begins = self._units(keys, row, text)
        here = torch.arange(length)
        unit = torch.where(begins, here, 0).cummax(dim=1).values  # where each token's unit begins
        score = noise.bits(keys, UNIT, here).gather(1, unit) * length + here
        order = torch.where(text, score, NEVER).argsort(dim=1)
        number = (self.config.mask_rate * text.sum(dim=1)).round().long().clamp(1, count)
        number = torch.minimum(number, text.sum(dim=1))
        number = _whole(unit.gather(1, order), number)
        places = torch.where(here[:count] < number[:, None], order[:, :count], length).sort(dim=1).values
        counted = places < length
        places = torch.where(counted, places, 0)
        targets = row.gather(1, places)
        inputs = row.scatter(1, places, torch.where(counted, self._shown(keys, targets, places, unit), targets))
        return inputs, places, targets, counted.float()

    def _units(self, keys: Tensor, row: Tensor, text: Tensor) -> Tensor:
        """(B, S) whether a token begins what is hidden together. What is no text, and what follows it, does."""
        apart = ~text | F.pad(~text[:, :-1], (1, 0), value=True)
        if self.config.masking == "word":
            left, right = self.symbols.joins_left[row], self.symbols.joins_right[row]
            return apart | ~(left & F.pad(right[:, :-1], (1, 0)))
        if self.config.masking == "token":
            return torch.ones_like(apart)
        length = row.shape[1]
        drawn = noise.bits(keys, LENGTH, torch.arange(length))
        lengths = 1 + torch.bucketize(drawn, self.thresholds, right=True)
        return apart | reached(torch.arange(length) + lengths)

    def _shown(self, keys: Tensor, targets: Tensor, places: Tensor, unit: Tensor) -> Tensor:
        """What stands at the places (B, P) instead of the targets: the mask, any token, or the target itself."""
        length = unit.shape[1]
        together = unit.gather(1, places) if self.config.masking == "span" else places
        drawn = noise.bits(keys, REPLACE, torch.arange(length)).gather(1, together) / 2**32
        words = self.symbols.text
        other = words[noise.bits(keys, TOKEN, torch.arange(length)).gather(1, places) % len(words)]
        masked, random = self.config.mask_share, self.config.random_share
        shown = torch.where(drawn < masked + random, other, targets)
        return torch.where(drawn < masked, self.symbols.mask, shown)


def _whole(units: Tensor, number: Tensor) -> Tensor:
    """The most of `number` (B,) of the first tokens that cut no unit; `number` itself if that would leave none. units
    (B, S): of the tokens in the order in which they are taken."""
    ends = units != F.pad(units[:, 1:], (0, 1), value=-1)
    taken = torch.arange(1, units.shape[1] + 1)
    best = torch.where(ends & (taken <= number[:, None]), taken, 0).amax(dim=1)
    return torch.where(best > 0, best, number)


def span_thresholds(probability: float, limit: int) -> Tensor:
    """(limit - 1,) int64: a number below 2^32 is a span as long as 1 + how many of these are not above it. Lengths up to
    the limit have their geometric probability, made to sum to 1."""
    weights = [(1 - probability) ** length for length in range(limit)]
    sums = [sum(weights[: length + 1]) / sum(weights) for length in range(limit - 1)]
    return torch.tensor([math.floor(share * 2**32) for share in sums], dtype=torch.int64)


def reached(following: Tensor) -> Tensor:
    """(B, S) whether a place is reached from place 0 by going from each place i to following[i] > i, (B, S).

    By doubling: what 2^k steps lead to is known for every place, and whoever is reached passes it on."""
    rows, length = following.shape
    jump = F.pad(following.clamp(max=length), (0, 1), value=length)
    found = torch.zeros(rows, length + 1, dtype=torch.int64)
    found[:, 0] = 1
    for _ in range(max(length - 1, 1).bit_length()):
        found = found.scatter_reduce(1, jump, found, "amax")
        jump = jump.gather(1, jump)
    return found[:, :length] > 0
