"""Filler in every text objective: never predicted, hidden or counted, of no document but its own; and without it nothing is
other than it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.objective import ObjectiveConfig
from pretrain.objectives.batch import MaskedBatch
from pretrain.objectives.causal import Causal
from pretrain.objectives.filler import filler, lengths
from pretrain.objectives.pairs import Prefix
from tests.pretrain.objectives.golden import (
    APART,
    CLS,
    EOS,
    HASHES,
    NUMBERS,
    SEP,
    TEXT,
    batch_of,
    hash_of,
    masked,
    objectives,
    spans,
    tokens_of,
)

LENGTH = 48


def filled(used: Tensor, width: int = LENGTH + 1) -> Tensor:
    """(B, width): rows of which the first `used` (B,) tokens are text, ended by an end; the last token is the next row's."""
    tokens = tokens_of(NUMBERS[: len(used)], width)
    place = torch.arange(width)[None]
    tokens = torch.where((place >= used[:, None] - 1) & (place < width - 1), EOS, tokens)
    return tokens.scatter(1, (used - 2).clamp(min=0)[:, None], torch.where(used > 1, 7, EOS)[:, None])


USED = torch.tensor([48, 47, 40, 30, 25, 24, 9, 3, 2])
ROWS = filled(USED)
NOTHING = torch.full((4, LENGTH + 1), EOS)  # rows of filler alone


def test_filler_is_an_end_behind_an_end() -> None:
    text = torch.tensor([[EOS, 4, EOS, EOS, EOS, 5, EOS], [EOS, EOS, 4, 5, EOS, EOS, EOS]])
    assert filler(text, EOS).long().tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1, 1]]
    assert lengths(text, EOS).tolist() == [6, 4]
    assert lengths(NOTHING, EOS).tolist() == [0] * 4


@pytest.mark.parametrize("name", HASHES)
def test_samples_without_filler_are_what_they_were(name: str) -> None:
    assert hash_of(batch_of(dict(objectives())[name]())) == HASHES[name]


def test_the_hashes_are_of_samples_without_filler() -> None:
    assert not filler(tokens_of(NUMBERS), EOS).any() and (tokens_of(NUMBERS) == EOS).any()
    assert dict(objectives()).keys() == HASHES.keys()


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("across", [True, False])
def test_causal_rows_predict_their_documents_and_no_more(across: bool) -> None:
    """Of a row's n tokens the first is not predicted, and what the row's last place has behind it is another row's."""
    config = ObjectiveConfig(kind="causal", loss_across_documents=across)
    batch = Causal(config, EOS, 5, rows=True)(NUMBERS[: len(USED)], ROWS)
    place = torch.arange(LENGTH)
    wanted = (place[None] < USED[:, None] - 1).float()
    if not across:
        wanted *= ROWS[:, :-1] != EOS
    assert torch.equal(batch.mask, wanted)


def test_a_piece_does_not_predict_what_another_row_begins_with() -> None:
    tokens = torch.full((1, 9), 4)  # a row without an end: its document goes on elsewhere
    counted = [
        Causal(ObjectiveConfig(), EOS, 5, rows=rows)(NUMBERS[:1], tokens).mask[0].tolist() for rows in (True, False)
    ]
    assert counted == [[1] * 7 + [0], [1] * 8]


@pytest.mark.parametrize("options", [{}, APART], ids=["together", "apart"])
def test_prefix_counts_no_filler(options: dict[str, Any]) -> None:
    objective = Prefix(ObjectiveConfig(kind="prefix", **options), EOS, 5)
    batch = objective(NUMBERS[: len(USED)], ROWS)
    first = LENGTH - batch.targets.shape[1]
    place = torch.arange(first, LENGTH)
    assert torch.equal(batch.mask, (place[None] < USED[:, None]).float())
    assert not batch.mask[first >= USED].any(), "where the encoder reads filler nothing is predicted"


@pytest.mark.parametrize("options", [{}, APART], ids=["together", "apart"])
def test_spans_count_no_filler_and_hide_it(options: dict[str, Any]) -> None:
    objective = spans(options, rows=True)
    batch = objective(NUMBERS[: len(USED)], ROWS)
    cut, gone = objective.noise_mask(NUMBERS[: len(USED)], LENGTH), filler(ROWS[:, :-1], EOS)
    begins = cut & ~torch.nn.functional.pad(cut[:, :-1], (1, 0))
    real = ((cut & ~gone).sum(dim=1) + (begins & ~gone).sum(dim=1) + ~gone[:, -1]).float()
    assert torch.equal(batch.mask.sum(dim=1), real) and (real < batch.mask.shape[1]).any()
    assert batch.documents is not None and (batch.documents.diff(dim=1)[:, : -batch.targets.shape[1] - 1] >= 0).all()
    for row, documents, mask in zip(gone & ~cut, batch.documents, batch.mask, strict=True):
        of_source, of_target = documents.split((len(documents) - len(mask), len(mask)))
        fill = set(of_source[len(of_source) - int(row.sum()) :].tolist()) if row.any() else set()
        assert not fill & set(of_target[mask > 0].tolist()), "no target that counts sees filler"


@pytest.mark.parametrize("pairs", ["none", "next", "order"])
@pytest.mark.parametrize("masking", ["token", "word", "span"])
def test_a_masked_row_is_its_text_between_cls_and_sep(masking: str, pairs: str) -> None:
    objective = masked({"masking": masking, "pairs": pairs}, rows=True)
    batch = masked_rows(objective)
    room = LENGTH - (2 if pairs == "none" else 3)
    for row, documents, used in zip(restored(batch), batch.documents, USED.tolist(), strict=True):
        shown = row[documents == 0].tolist()
        assert shown[0] == CLS and shown[-1] == SEP and (row[documents > 0] == EOS).all()
        text = [token for token in shown if token not in (CLS, SEP)]
        if pairs == "none":
            assert len(shown) == len(text) + 2 == min(used - 1, room) + 2, "the end itself gives way to [SEP]"
        else:
            assert len(shown) <= min(used - 1, room) + 3 and shown.count(SEP) == 2
    assert (restored(batch)[hidden(batch)] < TEXT).all()
    number = hidden(batch).sum(dim=1)
    text = ((restored(batch) < TEXT) & (batch.documents == 0)).sum(dim=1)
    wanted = (0.15 * text).round().clamp(min=1)
    assert torch.equal(number, wanted.long()) if masking == "token" else (number <= wanted).all() and number.all()


def masked_rows(objective: Any) -> MaskedBatch:
    rows = torch.cat([ROWS, ROWS.flip(0)], dim=1) if objective.also is not None else ROWS
    batch: MaskedBatch = objective(NUMBERS[: len(USED)], rows)
    assert batch.documents is not None
    return batch


def restored(batch: MaskedBatch) -> Tensor:
    rows = batch.inputs.clone()
    for row, places, targets, mask in zip(rows, batch.places, batch.targets, batch.mask, strict=True):
        row[places[mask > 0]] = targets[mask > 0]
    return rows


def hidden(batch: MaskedBatch) -> Tensor:
    found = torch.zeros(batch.inputs.shape, dtype=torch.bool)
    for row, places, mask in zip(found, batch.places, batch.mask, strict=True):
        row[places[mask > 0]] = True
    return found


@pytest.mark.parametrize("pairs", ["next", "order"])
def test_segments_of_filled_rows(pairs: str) -> None:
    """Cut as the text is long, and of the same length whether they belong together or not."""
    batch = masked_rows(masked({"pairs": pairs}, rows=True))
    assert batch.labels is not None and batch.labelled is not None and set(batch.labels.tolist()) == {0, 1}
    for row, used, label, counts in zip(
        restored(batch), USED.tolist(), batch.labels.tolist(), batch.labelled.tolist(), strict=True
    ):
        whole = min(used - 1, LENGTH - 3)
        ends = (row == SEP).nonzero()[:, 0].tolist()
        first, second = ends[0] - 1, ends[1] - ends[0] - 1
        assert counts == (whole > 1 and second > 0)
        if counts and not (label and pairs == "next"):
            assert first + second == whole
        if counts:
            cut = second if label and pairs == "order" else first
            assert max(1, whole // 4) <= cut < max(2, whole - whole // 4) and first + second <= whole


def test_documents_of_masked_rows_apart() -> None:
    batch = masked_rows(masked(APART, rows=True))
    for row, documents, used in zip(restored(batch), batch.documents, USED.tolist(), strict=True):
        real = min(used - 1, LENGTH - 2) + 2
        ends = (row[:real] == EOS).long()
        assert documents[:real].tolist() == (ends.cumsum(0) - ends).tolist()
        assert set(documents[real:].tolist()) <= {LENGTH}


# -- rows of filler alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("name", HASHES)
def test_a_row_of_filler_alone_counts_nothing(name: str, rows: bool) -> None:
    objective = dict(objectives(rows=rows))[name]()
    tokens = NOTHING if objective.also is None else torch.cat([NOTHING, NOTHING], dim=1)
    batch = objective(NUMBERS[:4], tokens)
    assert not batch.counts().any()


def test_a_partner_of_filler_alone_makes_no_pair() -> None:
    """Of a chunk that could not be read, among samples that are no rows."""
    objective = masked({"pairs": "next"})
    rows = tokens_of(NUMBERS)
    batch = objective(NUMBERS, torch.cat([rows, NOTHING[:1].expand(len(rows), -1)], dim=1))
    assert batch.labels is not None and torch.equal(batch.labelled, 1.0 - batch.labels)
