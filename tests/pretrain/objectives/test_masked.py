"""What the masked objective makes of a sample: exact shares, whole units, pairs; a pure function of (seed, number)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.config.objective import ObjectiveConfig
from pretrain.objectives.batch import MaskedBatch
from pretrain.objectives.masked import REACH, Masked, Symbols, reached, span_thresholds

TEXT, EOS, MASK, CLS, SEP, SIZE = 1000, 1000, 1001, 1002, 1003, 1004
LANES = 8


def make(**options: Any) -> Masked:
    """Ids that are multiples of three begin a word, of seven end a sentence."""
    ids = torch.arange(SIZE)
    text = torch.arange(TEXT)
    symbols = Symbols(MASK, CLS, SEP, EOS, text, ids % 3 != 0, torch.ones(SIZE, dtype=torch.bool), ids % 7 == 0)
    return Masked(ObjectiveConfig(kind="masked", **options), symbols, 5, LANES)


def tokens_of(numbers: Tensor, length: int, ends: float = 0.02) -> Tensor:
    rows = []
    for number in numbers.tolist():
        generator = torch.Generator().manual_seed(number)
        row = torch.randint(TEXT, (length + 1,), generator=generator)
        rows.append(torch.where(torch.rand(length + 1, generator=generator) < ends, EOS, row))
    return torch.stack(rows)


def run(objective: Masked, numbers: Tensor, length: int = 64, ends: float = 0.02) -> MaskedBatch:
    tokens = tokens_of(numbers, length, ends)
    if objective.also is not None:
        tokens = torch.cat([tokens, tokens_of(torch.from_numpy(objective.also(numbers.numpy())), length, ends)], 1)
    return objective(numbers, tokens)


def restored(batch: MaskedBatch) -> Tensor:
    """The rows before anything was hidden."""
    rows = batch.inputs.clone()
    for row, places, targets, mask in zip(rows, batch.places, batch.targets, batch.mask, strict=True):
        row[places[mask > 0]] = targets[mask > 0]
    return rows


def hidden(batch: MaskedBatch) -> Tensor:
    """(B, S) whether a place is predicted."""
    found = torch.zeros(batch.inputs.shape, dtype=torch.bool)
    for row, places, mask in zip(found, batch.places, batch.mask, strict=True):
        row[places[mask > 0]] = True
    return found


NUMBERS = torch.arange(400)


@pytest.mark.parametrize("masking", ["token", "word", "span"])
@pytest.mark.parametrize("pairs", ["none", "next", "order"])
def test_what_is_not_predicted_stays_and_targets_are_what_was_there(masking: str, pairs: str) -> None:
    batch = run(make(masking=masking, pairs=pairs), NUMBERS)
    rows, text = restored(batch), hidden(batch)
    assert torch.equal(batch.inputs[~text], rows[~text])
    assert (rows[text] < TEXT).all(), "no special id is ever predicted"
    assert (rows[:, 0] == CLS).all() and (rows[:, -1] == SEP).all()
    assert (batch.places.diff(dim=1)[batch.mask[:, 1:] > 0] > 0).all(), "ascending, each once"
    assert batch.places[batch.mask == 0].eq(0).all()
    if pairs == "none":
        assert torch.equal(rows[:, 1:-1], tokens_of(NUMBERS, 64)[:, :62])


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.5])
def test_exactly_the_rate_of_each_sequences_text_is_predicted(rate: float) -> None:
    batch = run(make(mask_rate=rate), NUMBERS, ends=0.3)
    text = (restored(batch) < TEXT).sum(dim=1)
    wanted = (rate * text).round().clamp(min=1)
    assert torch.equal(batch.mask.sum(dim=1), wanted)


def test_a_sequence_without_text_has_no_targets() -> None:
    objective = make()
    batch = objective(torch.arange(2), torch.full((2, 65), EOS))
    assert not batch.mask.any() and (batch.inputs[:, 1:-1] == EOS).all()


@pytest.mark.parametrize(("masked", "other"), [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_shares_of_what_is_shown(masked: float, other: float) -> None:
    batch = run(make(mask_rate=0.5, mask_share=masked, random_share=other), NUMBERS, 128)
    shown, truth = batch.inputs[hidden(batch)], restored(batch)[hidden(batch)]
    count = len(shown)
    found = (shown == MASK).float().mean().item()
    kept = (shown == truth).float().mean().item()
    sigma = 0.5 / count**0.5
    assert abs(found - masked) < 5 * sigma
    assert abs(kept - (1 - masked - other * (1 - 1 / TEXT))) < 5 * sigma
    drawn = shown[(shown != MASK) & (shown != truth)]
    if other:
        assert (drawn < TEXT).all()
        halves = (drawn < TEXT // 2).float().mean().item()
        assert abs(halves - 0.5) < 5 * 0.5 / len(drawn) ** 0.5


def test_every_place_is_predicted_as_often() -> None:
    counts = hidden(run(make(), torch.arange(4000), ends=0.0))[:, 1:-1].float().mean(dim=0)
    share = round(0.15 * 62) / 62
    assert ((counts - share).abs() < 5 * (share * (1 - share) / 4000) ** 0.5).all()


def test_words_are_hidden_whole() -> None:
    batch = run(make(masking="word"), NUMBERS, 128)
    rows, text = restored(batch), hidden(batch)
    begins = (rows % 3 == 0) | (rows >= TEXT)
    begins[:, 1:] |= rows[:, :-1] >= TEXT
    word = begins.long().cumsum(dim=1)
    partly = 0
    for words, gone in zip(word, text, strict=True):
        inside = {int(w) for w in words[gone]}
        partly += any(gone[words == w].sum() != (words == w).sum() for w in inside)
    assert partly == 0
    wanted = (0.15 * (rows < TEXT).sum(dim=1)).round()
    assert (text.sum(dim=1) <= wanted).all() and text.sum() > 0.85 * wanted.sum()


def test_a_word_longer_than_the_share_is_hidden_in_part() -> None:
    objective = make(masking="word", mask_rate=0.05)
    batch = objective(torch.arange(20), torch.full((20, 65), 1))  # one word of 62 pieces
    assert (batch.mask.sum(dim=1) == 3).all()


def test_spans_have_spanberts_lengths_and_are_shown_as_one() -> None:
    batch = run(make(masking="span", mask_rate=0.05), torch.arange(3000), 256, ends=0.0)
    lengths: list[int] = []
    mixed = 0
    for row, truth, gone in zip(batch.inputs, restored(batch), hidden(batch), strict=True):
        places = gone.nonzero()[:, 0].numpy()
        for run_of in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            lengths.append(len(run_of))
            kinds = {"mask" if row[p] == MASK else "kept" if row[p] == truth[p] else "other" for p in run_of}
            mixed += len(kinds - {"kept"}) > 1  # a random token may be the one that was there
    weights = np.array([0.8**n for n in range(10)])
    mean = float((weights / weights.sum() * np.arange(1, 11)).sum())
    assert 3.7 < mean < 3.9  # the paper's 3.8
    # Two spans side by side look like one, and the last one that would be too many is left out.
    assert abs(np.mean(lengths) - mean) < 0.5 and min(lengths) == 1
    assert mixed < 0.05 * len(lengths)


def test_span_lengths_are_geometric() -> None:
    thresholds = span_thresholds(0.2, 10)
    drawn = torch.arange(0, 2**32, 2**12 - 1)
    lengths = 1 + torch.bucketize(drawn, thresholds, right=True)
    shares = torch.bincount(lengths, minlength=11)[1:] / len(drawn)
    weights = torch.tensor([0.8**n for n in range(10)])
    torch.testing.assert_close(shares, weights / weights.sum(), rtol=0, atol=1e-5)


def test_reached_is_a_walk() -> None:
    following = torch.arange(50) + torch.randint(1, 6, (20, 50), generator=torch.Generator().manual_seed(1))
    for row, found in zip(following.tolist(), reached(following), strict=True):
        place, walked = 0, set()
        while place < 50:
            walked.add(place)
            place = row[place]
        assert set(found.nonzero()[:, 0].tolist()) == walked


# -- pairs -------------------------------------------------------------------------------------------------------------


def segments_of(row: Tensor) -> tuple[list[int], list[int]]:
    ends = (row == SEP).nonzero()[:, 0].tolist()
    assert len(ends) == 2
    return row[1 : ends[0]].tolist(), row[ends[0] + 1 : ends[1]].tolist()


@pytest.mark.parametrize("pairs", ["next", "order"])
def test_segments_are_the_sides_of_a_cut(pairs: str) -> None:
    objective = make(pairs=pairs)
    batch = run(objective, NUMBERS)
    own = tokens_of(NUMBERS, 64)[:, :61].tolist()
    others = None
    if objective.also is not None:
        others = tokens_of(torch.from_numpy(objective.also(NUMBERS.numpy())), 64).tolist()
    assert batch.labels is not None
    for index, (row, label) in enumerate(zip(restored(batch), batch.labels.tolist(), strict=True)):
        first, second = segments_of(row)
        assert batch.segments[index].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        if not label:
            assert first + second == own[index]
        elif others is not None:
            assert first == own[index][: len(first)] and second == others[index][: len(second)]
        else:
            assert second + first == own[index]
        cut = len(second) if label and others is None else len(first)
        assert 15 <= cut <= 46, "between a quarter and three quarters"
        before = own[index][cut - 1]
        assert before != EOS
        middle = [token for token in own[index][14:45] if token != EOS]
        assert before % 7 == 0 or not any(token % 7 == 0 for token in middle), "after a sentence's end if there is one"
    share = batch.labels.float().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / len(NUMBERS) ** 0.5
    assert batch.labelled is not None and batch.labelled.all()


def test_partners_are_other_samples_of_the_same_lane() -> None:
    also = make(pairs="next").also
    assert also is not None and make(pairs="order").also is None and make().also is None
    numbers = np.arange(5000)
    partners = also(numbers)
    turns = (partners - numbers) // LANES
    assert (partners % LANES == numbers % LANES).all() and turns.min() == 1 and turns.max() == REACH
    assert np.array_equal(also(numbers[17:20]), partners[17:20])


# -- a pure function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", ["token", "word", "span"])
@pytest.mark.parametrize("pairs", ["none", "next", "order"])
def test_a_sample_is_the_same_in_any_batch(masking: str, pairs: str) -> None:
    objective = make(masking=masking, pairs=pairs)
    whole = run(objective, NUMBERS)
    part = run(objective, NUMBERS[[17, 3, 200]])
    for name, tensor in whole._asdict().items():
        if tensor is not None:
            assert torch.equal(getattr(part, name), tensor[[17, 3, 200]]), name
    again = run(objective, NUMBERS + 100_000)
    assert not torch.equal(hidden(again), hidden(whole))


def test_documents_are_kept_apart_on_request() -> None:
    batch = run(make(attention_across_documents=False), NUMBERS)
    assert batch.documents is not None and run(make(), NUMBERS).documents is None
    for row, documents in zip(restored(batch), batch.documents, strict=True):
        assert torch.equal(documents, ((row == EOS).cumsum(0) - (row == EOS).long()).int())


def test_a_batch_without_some_samples_counts_them_no_more() -> None:
    batch = run(make(pairs="order"), NUMBERS[:4])
    gone = batch.without(torch.tensor([False, True, False, True]))
    assert torch.equal(gone.counts(), batch.counts() * torch.tensor([0.5, 0.5]))
    assert not gone.mask[1].any() and torch.equal(gone.mask[0], batch.mask[0])
