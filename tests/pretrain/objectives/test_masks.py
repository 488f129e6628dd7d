"""Masks are a function of (seed, sample number): the papers' shares, the same for any number of ranks, other ones in the next
epoch, and held-out data with the same ones at each validation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.config.run import Config
from pretrain.data.stream import Stream, rank_numbers
from pretrain.objectives.choice import objective_of
from pretrain.validation import Validation
from pretrain.vocabulary import vocabulary_of
from tests.pretrain.data.corpus import quietly, stdlib_texts, write_texts
from tests.pretrain.objectives.golden import CLS, EOS, MASK, NUMBERS, SEP, TEXT, masked, tokens_of

LENGTH = 64
KINDS: dict[str, dict[str, Any]] = {
    "token": {"kind": "masked"},
    "word": {"kind": "masked", "masking": "word", "pairs": "next"},
    "span": {"kind": "masked", "masking": "span", "pairs": "order"},
    "spans": {"kind": "span-corruption"},
}


def config_of(kind: str, seed: int = 1) -> Config:
    model = {"kind": "encoder-decoder" if kind == "spans" else "bert"}
    return Config(
        model=model, objective=KINDS[kind], run={"seed": seed}, batch={"size": 8, "micro_size": 2},
        data={"seq_length": LENGTH},
    )  # fmt: skip


@pytest.fixture(scope="module", params=["concat", "sentences", "fit"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("masks")
    corpus = write_texts(out / "texts", stdlib_texts(6))
    rows = {} if request.param == "concat" else {"packing": request.param, "seq_length": LENGTH}
    quietly([corpus], out / "shards", vocab_size=420, validation=0, max_train_bytes=20_000, **rows)
    return out / "shards" / "train"


def made(folder: Path, kind: str, numbers: np.ndarray, seed: int = 1) -> dict[int, list[Any]]:
    """All tensors of each sample number."""
    stream = Stream([folder], LENGTH, seed=1, lanes=8)
    config, tokenizer = config_of(kind, seed), stream.manifests[0].tokenizer()
    rows = stream.manifests[0].packing.is_rows_of_text
    objective = objective_of(config, tokenizer, vocabulary_of(config, tokenizer), stream.lanes, rows)
    batch = objective(torch.from_numpy(numbers), torch.from_numpy(stream.read(numbers, objective.also)))
    stream.close()
    tensors = [tensor for tensor in batch if tensor is not None]
    return {number: [tensor[row].tolist() for tensor in tensors] for row, number in enumerate(numbers.tolist())}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_the_same_mask_for_any_number_of_ranks(folder: Path, kind: str) -> None:
    whole = made(folder, kind, np.arange(24))
    for ranks in (2, 3, 4, 8):
        found: dict[int, list[Any]] = {}
        for rank in range(ranks):
            found |= made(folder, kind, rank_numbers(0, 24, rank, ranks, 8))
        assert found == whole


@pytest.mark.parametrize("kind", ["token", "spans"])
def test_the_same_text_has_another_mask_in_the_next_epoch(folder: Path, kind: str) -> None:
    stream = Stream([folder], LENGTH, seed=1, lanes=8)
    epoch = stream.samples_per_epoch
    first = np.arange(epoch)
    places = {sample: number for number, sample in enumerate(stream.order.locate(first)[1].tolist())}
    later = first + epoch
    numbers = np.array([places[sample] for sample in stream.order.locate(later)[1].tolist()])
    assert np.array_equal(stream.read(numbers), stream.read(later)), "the same texts"
    one, other = made(folder, kind, numbers), made(folder, kind, later)
    same = [one[here][0] == other[there][0] for here, there in zip(numbers.tolist(), later.tolist(), strict=True)]
    assert np.mean(same) < 0.02
    stream.close()


def test_another_seed_has_other_masks(folder: Path) -> None:
    one, other = made(folder, "token", np.arange(8)), made(folder, "token", np.arange(8), seed=2)
    assert all(one[number] != other[number] for number in one)


class Kept:
    """In place of a schedule: keeps the batches that it is given."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def run(self, batches: list[Any], scale: float, forward_only: bool) -> Tensor:
        self.batches += batches
        return torch.zeros(2)


def test_held_out_masks_are_the_same_at_each_validation_and_for_any_number_of_ranks(folder: Path) -> None:
    stream = Stream([folder], LENGTH, seed=1, lanes=8, shuffle=False)
    config, tokenizer = config_of("token"), stream.manifests[0].tokenizer()
    objective = objective_of(config, tokenizer, vocabulary_of(config, tokenizer), 8)
    found = []
    for ranks in (1, 1, 2):
        samples: dict[int, Any] = {}
        for rank in range(ranks):
            grid = SimpleNamespace(
                data_rank=rank, data_size=ranks, layout=SimpleNamespace(pipeline=1), device=torch.device("cpu"),
                reads_loss=True, reads_data=True, total=lambda tensor: tensor,
            )  # fmt: skip
            schedule: Any = Kept()
            Validation(config, grid, objective, stream).run(schedule)  # type: ignore[arg-type]
            for batch in schedule.batches:
                for key, inputs, mask in zip(batch.sample_keys.tolist(), batch.inputs, batch.mask, strict=True):
                    if mask.any():
                        samples[key] = inputs.tolist()
        found.append(samples)
    assert found[0] == found[1] == found[2] and len(found[0]) == stream.samples_per_epoch
    stream.close()


# -- shares ------------------------------------------------------------------------------------------------------------


def test_fifteen_of_a_hundred_are_predicted_and_eighty_ten_ten_shown() -> None:
    """Devlin et al. 2018, section 3.1, within three standard deviations of independent draws."""
    numbers = torch.arange(3000)
    tokens = tokens_of(numbers, 129)
    batch = masked({}, rows=False)(numbers, tokens)
    rows = torch.cat([torch.full((3000, 1), CLS), tokens[:, :-3], torch.full((3000, 1), SEP)], dim=1)
    text = (rows < TEXT).sum(dim=1)
    assert torch.equal(batch.mask.sum(dim=1), (0.15 * text).round()), "the share of each sequence, but for rounding"
    shown = batch.inputs.gather(1, batch.places)[batch.mask > 0]
    truth = batch.targets[batch.mask > 0]
    count = len(truth)
    kinds = {"mask": shown == MASK, "kept": shown == truth, "other": (shown != MASK) & (shown != truth)}
    # A token that is drawn may be the one that was there.
    wanted = {"mask": 0.8, "kept": 0.1 + 0.1 / TEXT, "other": 0.1 - 0.1 / TEXT}
    for name, where in kinds.items():
        sigma = (wanted[name] * (1 - wanted[name]) / count) ** 0.5
        assert abs(where.float().mean().item() - wanted[name]) < 3 * sigma, name
    assert (shown[kinds["other"]] < TEXT).all() and count > 50_000


def test_words_are_hidden_whole_in_packed_rows() -> None:
    """Ids that are multiples of three begin a word. Only one that is longer than the share is hidden in part, and alone."""
    tokens = tokens_of(NUMBERS)
    tokens[:, 30:] = EOS
    batch = masked({"masking": "word"}, rows=True)(NUMBERS, tokens)
    assert batch.documents is not None and batch.documents.any()
    partly = 0
    for row, places, targets, mask in zip(batch.inputs, batch.places, batch.targets, batch.mask, strict=True):
        whole = row.clone()
        whole[places[mask > 0]] = targets[mask > 0]
        begins = (whole % 3 == 0) | (whole >= TEXT)
        begins[1:] |= whole[:-1] >= TEXT
        words = begins.long().cumsum(0)
        gone = torch.zeros(len(row), dtype=torch.bool)
        gone[places[mask > 0]] = True
        inside = set(words[gone].tolist())
        partly += any(not gone[words == word].all() for word in inside)
        assert inside and (len(inside) == 1 or all(gone[words == word].all() for word in inside))
    assert partly < len(NUMBERS) / 3
