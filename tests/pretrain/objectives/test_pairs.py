"""What an encoder-decoder's objectives make of a sample: packed pairs, text cut in two, spans cut out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.config.objective import ObjectiveConfig
from pretrain.objectives.batch import PairBatch
from pretrain.objectives.pairs import Prefix, SequenceToSequence
from pretrain.objectives.spans import SpanCorruption

TEXT, EOS, SENTINELS = 1000, 1000, 40
FIRST = TEXT + SENTINELS  # the id of the first span's sentinel; those of the next are below
NUMBERS = torch.arange(200)


def spans(**options: Any) -> SpanCorruption:
    ids = torch.arange(FIRST, TEXT, -1)
    return SpanCorruption(ObjectiveConfig(kind="span-corruption", **options), ids, EOS, 5)


def tokens_of(numbers: Tensor, length: int, ends: float = 0.02) -> Tensor:
    rows = []
    for number in numbers.tolist():
        generator = torch.Generator().manual_seed(number)
        row = torch.randint(TEXT, (length + 1,), generator=generator)
        rows.append(torch.where(torch.rand(length + 1, generator=generator) < ends, EOS, row))
    return torch.stack(rows)


def sides(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Source (B, M) and what the decoder reads (B, S)."""
    return batch.inputs.split((batch.inputs.shape[1] - batch.targets.shape[1], batch.targets.shape[1]), dim=1)


def assert_moved_by_one(batch: PairBatch) -> None:
    read = sides(batch)[1]
    assert (read[:, 0] == EOS).all() and torch.equal(read[:, 1:], batch.targets[:, :-1])


# -- packed pairs ------------------------------------------------------------------------------------------------------


def test_packed_pairs() -> None:
    objective = SequenceToSequence(ObjectiveConfig(kind="sequence-to-sequence", source_length=7), EOS, 5)
    row = [1, 2, EOS, 3, EOS, EOS, EOS, 11, EOS, 12, 13, EOS, EOS, 99]
    batch = objective(torch.tensor([3]), torch.tensor([row]))
    assert sides(batch)[0].tolist() == [row[:7]] and batch.targets.tolist() == [row[7:13]]
    assert_moved_by_one(batch)
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1, 0]], "what fills the row is not predicted"
    assert batch.documents is not None
    source, target = batch.documents.split((7, 6), dim=1)
    assert source[0, :5].tolist() == [0, 0, 0, 1, 1] and target[0, :5].tolist() == [0, 0, 1, 1, 1]
    filling = {*source[0, 5:].tolist()}, {*target[0, 5:].tolist()}
    assert not filling[0] & {0, 1, *filling[1]} and not filling[1] & {0, 1}, "what fills a side is of no pair"
    for side in (source, target):
        assert (side.diff() >= 0).all(), "cross-attention needs numbers that do not fall"
    assert batch.counts().item() == 5


def test_a_full_row_has_nothing_to_fill() -> None:
    objective = SequenceToSequence(ObjectiveConfig(kind="sequence-to-sequence"), EOS, 5)
    batch = objective(torch.tensor([3]), torch.tensor([[1, 2, EOS, 3, 4, EOS, 0]]))
    assert batch.mask.all() and batch.documents is not None and not batch.documents.any()


# -- text cut in two ---------------------------------------------------------------------------------------------------


def test_prefix() -> None:
    tokens = tokens_of(NUMBERS, 20)
    batch = Prefix(ObjectiveConfig(kind="prefix", prefix_share=0.25), EOS, 5)(NUMBERS, tokens)
    assert torch.equal(sides(batch)[0], tokens[:, :5]) and torch.equal(batch.targets, tokens[:, 5:20])
    assert_moved_by_one(batch)
    assert batch.mask.all() and batch.documents is None


def test_prefix_of_documents_apart() -> None:
    """A target's document is that of the token that is predicted, so it sees the part of it that the encoder has."""
    config = ObjectiveConfig(kind="prefix", attention_across_documents=False)
    batch = Prefix(config, EOS, 5)(torch.tensor([0]), torch.tensor([[1, EOS, 2, 3, 4, EOS, 5, EOS, 9]]))
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2]]


# -- spans cut out -----------------------------------------------------------------------------------------------------


def restored(batch: PairBatch) -> list[list[int]]:
    """The rows before anything was cut out."""
    found = []
    for source, target in zip(sides(batch)[0].tolist(), batch.targets.tolist(), strict=True):
        assert source[-1] == target[-1] == EOS
        pieces: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token > TEXT:
                pieces[token] = []
            else:
                pieces[max(pieces.keys(), key=list(pieces).index)].append(token)
        row: list[int] = []
        for token in source[:-1]:
            row += pieces.pop(token) if token > TEXT else [token]
        assert not pieces, "a sentinel of the target that the source lacks"
        found.append(row)
    return found


@given(st.integers(2, 90), st.floats(0.05, 0.9), st.floats(1, 8))
def test_nothing_is_lost(length: int, rate: float, mean: float) -> None:
    objective = spans(noise_rate=rate, noise_span=mean)
    count, number = objective.config.spans(length)
    if number > SENTINELS:
        return
    tokens = tokens_of(NUMBERS[:8], length)
    batch = objective(NUMBERS[:8], tokens)
    assert (sides(batch)[0].shape[1], batch.targets.shape[1]) == objective.config.lengths(length)
    assert restored(batch) == tokens[:, :-1].tolist()
    assert ((batch.targets > TEXT).sum(dim=1) == number).all()
    assert ((batch.targets <= TEXT).sum(dim=1) == count + 1).all()
    assert_moved_by_one(batch)
    assert batch.mask.all() and batch.documents is None


def test_sentinels_are_in_order_and_spans_apart() -> None:
    batch = spans()(NUMBERS, tokens_of(NUMBERS, 64))
    for side in (sides(batch)[0], batch.targets):
        for row in side.tolist():
            marks = [token for token in row if token > TEXT]
            assert marks == list(range(FIRST, FIRST - len(marks), -1))
    source = sides(batch)[0]
    assert (source[:, 0] <= TEXT).all(), "a sample begins with what stays"
    assert (source[:, -2] > TEXT).all(), "and ends with a span"
    assert not ((source[:, 1:] > TEXT) & (source[:, :-1] > TEXT)).any(), "two spans have something between them"


def test_every_way_has_the_same_chance() -> None:
    """Of 6 tokens 3 are cut out in 2 spans: 2 ways for the spans, 2 for the runs between."""
    objective = spans(noise_rate=0.5, noise_span=1.5)
    masks = objective.noise_mask(torch.arange(4000), 6)
    counted = Counter(map(tuple, masks.tolist()))
    assert len(counted) == 4
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counted.values())


def test_it_depends_on_the_sample_alone() -> None:
    objective, tokens = spans(), tokens_of(NUMBERS, 64)
    whole = objective(NUMBERS, tokens)
    order = torch.randperm(len(NUMBERS), generator=torch.Generator().manual_seed(1))
    turned = objective(NUMBERS[order], tokens[order])
    assert torch.equal(turned.inputs, whole.inputs[order]) and torch.equal(turned.targets, whole.targets[order])
    other = SpanCorruption(objective.config, objective.sentinels, EOS, 6)(NUMBERS, tokens)
    assert not torch.equal(other.targets, whole.targets)


def test_documents_apart() -> None:
    """Each token of either side is of the document that it was cut from, a sentinel of its span's first token."""
    objective = spans(attention_across_documents=False, noise_rate=0.3)
    tokens = tokens_of(NUMBERS, 64, ends=0.1)
    batch = objective(NUMBERS, tokens)
    assert batch.documents is not None
    of_source, of_target = batch.documents.split((sides(batch)[0].shape[1], batch.targets.shape[1]), dim=1)
    masks = objective.noise_mask(NUMBERS, 64).tolist()
    for row, cut in enumerate(masks):
        text = tokens[row, :-1].tolist()
        number = [text[:place].count(EOS) for place in range(64)]
        begins = [cut[place] and not cut[place - 1] for place in range(64)]
        places = [place for place in range(64) if not cut[place] or begins[place]]
        assert of_source[row, :-1].tolist() == [number[place] for place in places]
        wanted = []
        for place in range(64):
            wanted += [number[place]] * (cut[place] + begins[place])
        assert of_target[row, :-1].tolist() == wanted
        assert of_source[row, -1] == of_source[row, -2] and of_target[row, -1] == of_target[row, -2]


def test_t5s_own_lengths() -> None:
    """568 tokens become 512 and 114 (the authors' `random_spans_helper` with inputs of 512 tokens)."""
    assert ObjectiveConfig(kind="span-corruption").lengths(568) == (512, 114)


@pytest.mark.parametrize("kind", ["prefix", "span-corruption"])
def test_gone_samples_count_nothing(kind: str) -> None:
    config = ObjectiveConfig(kind=kind)
    objective = Prefix(config, EOS, 5) if kind == "prefix" else spans()
    batch = objective(NUMBERS[:4], tokens_of(NUMBERS[:4], 32))
    half = batch.without(torch.tensor([True, False, True, False]))
    assert half.counts().item() * 2 == batch.counts().item()
