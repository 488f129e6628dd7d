"""The causal objective: what is predicted from what, which targets count, and the samples' keys."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.noise import sample_keys
from pretrain.objectives.causal import Causal

EOS = 2
TOKENS = torch.tensor([[5, 6, EOS, 7, 8, EOS, EOS, 9], [EOS, 3, 4, 5, 6, 7, 8, EOS]])
NUMBERS = torch.tensor([4, 2**40 + 1])


class Config(NamedTuple):
    loss_across_documents: bool
    attention_across_documents: bool = True


@pytest.mark.parametrize("across", [True, False])
def test_each_position_predicts_the_next_token(across: bool) -> None:
    batch = Causal(Config(across), EOS, seed=1)(NUMBERS, TOKENS)
    for row, tokens in enumerate(TOKENS.tolist()):
        assert batch.inputs[row].tolist() == tokens[:-1]
        assert batch.targets[row].tolist() == tokens[1:]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64


def test_all_targets_count_across_documents_but_filler() -> None:
    mask = Causal(Config(True), EOS, seed=1)(NUMBERS, TOKENS).mask
    assert mask.dtype == torch.float32
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0, 1], [1] * 7]


def test_within_documents_their_first_tokens_do_not_count_but_their_ends_do() -> None:
    batch = Causal(Config(False), EOS, seed=1)(NUMBERS, TOKENS)
    counted = [[bool(token != EOS) for token in row[:-1]] for row in TOKENS.tolist()]
    assert batch.mask.bool().tolist() == counted
    assert batch.mask.sum() == 4 + 6
    assert batch.mask[0, 1] == 1, "the end of a document is predicted"


def test_documents_are_numbered_and_end_with_their_end() -> None:
    batch = Causal(Config(False, attention_across_documents=False), EOS, seed=1)(NUMBERS, TOKENS)
    assert batch.documents is not None and batch.documents.dtype == torch.int32
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1]]
    assert Causal(Config(False), EOS, seed=1)(NUMBERS, TOKENS).documents is None


@pytest.mark.parametrize("seed", [0, 7, 2**62])
def test_keys_are_those_of_seed_and_sample(seed: int) -> None:
    objective = Causal(Config(True), EOS, seed)
    keys = objective(NUMBERS, TOKENS).sample_keys
    assert torch.equal(keys, sample_keys(seed, NUMBERS))
    assert torch.equal(objective(NUMBERS[1:], TOKENS[1:]).sample_keys, keys[1:])
    assert not torch.equal(Causal(Config(True), EOS, seed + 1)(NUMBERS, TOKENS).sample_keys, keys)


def test_a_micro_batch_is_its_rows_of_the_batch() -> None:
    objective = Causal(Config(False, attention_across_documents=False), EOS, seed=1)
    whole: tuple[Tensor, ...] = objective(NUMBERS, TOKENS)
    for row in range(2):
        part = objective(NUMBERS[row : row + 1], TOKENS[row : row + 1])
        assert all(torch.equal(ours, theirs[row : row + 1]) for ours, theirs in zip(part, whole, strict=True))
