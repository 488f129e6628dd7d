"""GPT against transformers' models and, for every combination of options, against a naive one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.noise import sample_keys
from parallel.initial import initialise
from parallel.layers import Parts
from pretrain.config.model import ModelConfig, parameter_count
from pretrain.models.gpt import GPT
from tests.pretrain.models.references import (
    GPT2_SHAPE,
    LLAMA_SHAPE,
    Named,
    as_gpt2,
    as_llama,
    assert_gradients_equal,
    gradients_of,
    load,
    make_gpt,
    make_gpt2,
    make_llama,
    naive_loss,
    weights_of,
)

VOCAB, LENGTH = 50, 12
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 24,
    "initial_scale": 0.2,
}
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")


def make_batch(batch: int = 3, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and an uneven mask."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(VOCAB, (batch, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], (torch.rand(batch, length, generator=generator) < 0.7).float()


def loss_of(model: GPT, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    return model(inputs, targets, mask, None)


def loss_of_transformers(model: nn.Module, inputs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * mask.flatten()).sum()


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("ffn", [24, None])
def test_with_gpt2s_shape_it_is_gpt2(dtype: torch.dtype, tolerance: float, ffn: int | None) -> None:
    config = ModelConfig(**{**SMALL, **GPT2_SHAPE, "ffn_hidden_size": ffn})
    ours = make_gpt(config, VOCAB, LENGTH).to(dtype)
    theirs = make_gpt2(config, VOCAB, LENGTH).to(dtype)
    load(theirs, as_gpt2(weights_of(ours)))
    loss, expected = loss_of(ours, *make_batch()), loss_of_transformers(theirs, *make_batch())
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    loss.backward()
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_gradients_equal(as_gpt2(gradients_of(ours)), wanted, tolerance)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_size", [None, 6])
def test_with_llamas_shape_it_is_llama(groups: int, tied: bool, head_size: int | None) -> None:
    shape = {**SMALL, **LLAMA_SHAPE, "num_kv_heads": groups, "tie_embeddings": tied, "head_size": head_size}
    config = ModelConfig(**shape, rope_base=500.0, norm_epsilon=1e-3)
    ours, theirs = make_gpt(config, VOCAB, LENGTH), make_llama(config, VOCAB, LENGTH)
    load(theirs, as_llama(weights_of(ours)))
    loss, expected = loss_of(ours, *make_batch()), loss_of_transformers(theirs, *make_batch())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_gradients_equal(as_llama(gradients_of(ours)), wanted, 1e-5)


# -- every combination of options ------------------------------------------------------------------------------------

NORMS = list(itertools.product(("layer", "rms"), ("pre", "post")))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "relu", "swiglu", "geglu"])
@pytest.mark.parametrize(("norm", "norm_position"), NORMS)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_combination_of_options_is_the_naive_model(
    positions: str, activation: str, norm: str, norm_position: str, biases: bool, tied: bool
) -> None:
    options = {"positions": positions, "activation": activation, "norm": norm, "norm_position": norm_position}
    config = ModelConfig(
        **SMALL, **options, biases=biases, tie_embeddings=tied, num_kv_heads=2, attention_window=[5, None]
    )
    model = make_gpt(config, VOCAB, LENGTH).double()
    weights = weights_of(model)
    assert sum(weight.numel() for weight in weights.values()) == parameter_count(config, VOCAB, LENGTH)
    leaves: Named = {name: weight.requires_grad_() for name, weight in weights.items()}
    loss, expected = loss_of(model, *make_batch(2)), naive_loss(config, leaves, *make_batch(2))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # tables of positions are float32
    loss.backward()
    wanted = dict(zip(leaves, torch.autograd.grad(expected, list(leaves.values())), strict=True))
    assert_gradients_equal(gradients_of(model), wanted, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"head_size": 10},
        {"num_kv_heads": 1},
        {"max_positions": 40, "positions": "learned"},
        {"ffn_hidden_size": None, "activation": "geglu"},
        {"ffn_hidden_size": None, "activation": "relu"},
    ],
)
def test_parameters_are_counted_in_every_shape(options: dict[str, Any]) -> None:
    config = ModelConfig(**{**SMALL, **options})
    count = sum(weight.numel() for weight in weights_of(make_gpt(config, VOCAB, LENGTH)).values())
    assert parameter_count(config, VOCAB, LENGTH) == count


@pytest.mark.parametrize("positions", POSITIONS)
def test_bfloat16_weights_train_and_keep_their_positions(positions: str) -> None:
    config = ModelConfig(**SMALL, positions=positions, dropout=0.1)
    exact = make_gpt(config, VOCAB, LENGTH).eval()
    model = make_gpt(config, VOCAB, LENGTH).to(torch.bfloat16)
    assert {buffer.dtype for buffer in model.buffers()} <= {torch.float32}
    loss = model(*make_batch(), sample_keys(1, torch.arange(3)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(gradient).all() for gradient in gradients_of(model).values())
    assert loss_of(model.eval(), *make_batch()).item() == pytest.approx(loss_of(exact, *make_batch()).item(), rel=0.02)


# -- what it may see ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_later_token_changes_no_earlier_prediction(positions: str, norm_position: str) -> None:
    model = make_gpt(ModelConfig(**SMALL, positions=positions, norm_position=norm_position), VOCAB, LENGTH)
    inputs = make_batch()[0]
    before = model.logits(inputs)
    for place in range(LENGTH):
        changed = inputs.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        after = model.logits(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, place:], before[:, place:], rtol=0, atol=1e-3)


def test_a_later_token_changes_no_earlier_loss_in_training() -> None:
    config = ModelConfig(**SMALL, dropout=0.2, positions="rope")
    model, keys = make_gpt(config, VOCAB, LENGTH), sample_keys(1, torch.arange(3))
    inputs, targets, mask = make_batch()
    mask[:, 6:] = 0
    changed = inputs.clone()
    changed[:, 7:] = 0
    expected, found = model(inputs, targets, mask, keys), model(changed, targets, mask, keys)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_documents_in_a_row_train_as_each_in_a_row_of_its_own(positions: str, recompute: str) -> None:
    """Loss and every gradient: no document sees another, and its positions begin at 0."""
    config = ModelConfig(**SMALL, positions=positions)
    lengths = [[3, 1, 8], [12], [5, 7]]
    numbers = [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths]
    inputs, targets, mask = make_batch()
    packed, alone = make_gpt(config, VOCAB, LENGTH, recompute=recompute), make_gpt(config, VOCAB, LENGTH)
    loss = packed(inputs, targets, mask, None, torch.tensor(numbers, dtype=torch.int32))
    loss.backward()
    parts = []
    for row, cuts in enumerate(lengths):
        pieces = zip(*(x[row].split(cuts) for x in (inputs, targets, mask)), strict=True)
        parts += [loss_of(alone, *(x[None] for x in piece)) for piece in pieces]
    torch.stack(parts).sum().backward()
    assert loss.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-6)
    assert_gradients_equal(gradients_of(packed), gradients_of(alone), 1e-5)


@pytest.mark.parametrize(("windows", "reach"), [([1], 0), ([2, 4], 4), ([3, 3], 4), ([2, None], None), (3, 4)])
def test_windows_of_the_layers_add_up(windows: Any, reach: int | None) -> None:
    """A layer that sees w tokens reaches w - 1 back."""
    model = make_gpt(ModelConfig(**SMALL, positions="alibi", attention_window=windows), VOCAB, LENGTH)
    inputs = make_batch()[0]
    changed = inputs.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    differs = (model.logits(inputs) - model.logits(changed)).abs().amax(dim=(0, 2)) > 1e-6
    last = LENGTH - 1 if reach is None else reach
    assert differs.tolist() == [place <= last for place in range(LENGTH)]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 4, 2]])
def test_caches_give_what_the_whole_sequence_gives(positions: str, cuts: list[int]) -> None:
    config = ModelConfig(**SMALL, positions=positions, num_kv_heads=2, attention_window=[4, None])
    model, inputs = make_gpt(config, VOCAB, LENGTH), make_batch()[0]
    caches, first, found = model.make_caches(3, LENGTH), 0, []
    for count in cuts:
        found.append(model.logits(inputs[:, first : first + count], caches, first))
        first += count
    torch.testing.assert_close(torch.cat(found, dim=1), model.logits(inputs), rtol=0, atol=1e-5)
    assert found[0].shape == (3, cuts[0], VOCAB), "without the padding"


# -- a model cut into stages, and its mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_stages_one_after_the_other_are_the_whole_model(tied: bool) -> None:
    config = ModelConfig(**SMALL, dropout=0.2, tie_embeddings=tied)
    whole = make_gpt(config, VOCAB, LENGTH)
    cut = {"layers": range(1), "last": False}, {"layers": range(1, 2), "first": False}
    first, second = (make_gpt(config, VOCAB, LENGTH, **options) for options in cut)
    inputs, targets, mask = make_batch()
    keys = sample_keys(1, torch.arange(3))
    hidden = first(inputs, None, None, keys)
    assert hidden.shape == (3, LENGTH, 16)
    assert torch.equal(second(None, targets, mask, keys, hidden=hidden), whole(inputs, targets, mask, keys))
    assert (second.tied_copy is not None) == tied
    assert first.tied_copy is None
    assert whole.tied_copy is None
    together = {**weights_of(first), **weights_of(second)}
    assert set(together) == set(weights_of(whole))


def test_mistakes_are_told() -> None:
    config = ModelConfig(**SMALL, positions="learned")
    model = make_gpt(config, VOCAB, LENGTH)
    inputs, targets, mask = make_batch(length=LENGTH + 1)
    with pytest.raises(ValueError, match="13 positions asked for, but the model was made for 12"):
        loss_of(model, inputs, targets, mask)
    with pytest.raises(ValueError, match="positions before 3 are missing"):
        model.logits(inputs[:, :2], None, first=3)
    with pytest.raises(ValueError, match="the cache holds 4 positions, 5 are needed"):
        model.logits(inputs[:, :5], model.make_caches(3, 4))
    with pytest.raises(ValueError, match="found 'all'"):
        model.recompute = "all"  # type: ignore[assignment]
    stage = GPT(config, Parts(), VOCAB, LENGTH, layers=range(1), last=False)
    with pytest.raises(ValueError, match="whole model on one stage"):
        stage.logits(inputs)


@pytest.mark.parametrize("positions", ["alibi", "none"])
def test_without_a_table_of_positions_a_sequence_may_be_longer(positions: str) -> None:
    model = make_gpt(ModelConfig(**SMALL, positions=positions), VOCAB, LENGTH)
    assert torch.isfinite(loss_of(model, *make_batch(length=3 * LENGTH)))


def test_a_tied_head_is_the_embedding_and_padding_stays_zero() -> None:
    model = GPT(ModelConfig(**SMALL), Parts(), VOCAB, LENGTH)
    initialise(model, 1)
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.shape == (128, 16)
    loss_of(model, *make_batch()).backward()
    assert not model.embedding.weight[VOCAB:].any()
    assert model.embedding.weight.grad is not None
    assert not model.embedding.weight.grad[VOCAB:].any()
