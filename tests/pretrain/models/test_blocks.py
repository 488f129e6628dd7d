"""What a block adds to its formulas: recomputation, dropout by sample, and the scale and origin of its first weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import alibi_slopes
from kernels.noise import keep_mask, sample_keys
from parallel.axes import TensorAxis
from parallel.initial import initialise
from parallel.layers import Parts
from pretrain.config.model import ModelConfig
from pretrain.models.blocks import Table, drop, local_slopes
from pretrain.models.gpt import GPT
from tests.pretrain.models.references import Named, gradients_of, make_gpt, weights_of

VOCAB, LENGTH = 50, 12
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 24,
    "initial_scale": 0.2,
}
POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")
NUMBERS = torch.tensor([5, 6, 2**33])


def make_ids(batch: int = 3) -> Tensor:
    return torch.randint(VOCAB, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(4))


def train_once(model: GPT, numbers: Tensor = NUMBERS, ids: Tensor | None = None) -> tuple[Tensor, Named]:
    """Loss and gradients of one micro-batch."""
    ids = make_ids() if ids is None else ids
    loss = model(ids[:, :-1], ids[:, 1:], torch.ones(len(ids), LENGTH), sample_keys(1, numbers))
    loss.backward()
    found = gradients_of(model)
    model.zero_grad()
    return loss.detach(), found


def hidden_states(config: ModelConfig, ids: Tensor, numbers: Tensor, training: bool = True) -> Tensor:
    """(B, S, H) of a model without its head."""
    model = make_gpt(config, VOCAB, LENGTH, last=False).train(training)
    with torch.no_grad():
        return model(ids[:, :-1], None, None, sample_keys(1, numbers))


# -- recomputation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_not_a_bit(positions: str, norm_position: str, dtype: torch.dtype) -> None:
    options = {"positions": positions, "norm_position": norm_position, "attention_window": [5, None]}
    model = make_gpt(ModelConfig(**SMALL, **options, dropout=0.2), VOCAB, LENGTH).to(dtype)
    loss, gradients = train_once(model)
    for recompute in ("selective", "full"):
        model.recompute = recompute  # type: ignore[assignment]
        again, others = train_once(model)
        assert torch.equal(again, loss), recompute
        assert all(torch.equal(others[name], gradients[name]) for name in gradients), recompute


@pytest.mark.parametrize(
    ("recompute", "attention", "feed_forward"), [("none", 1, 1), ("selective", 2, 1), ("full", 2, 2)]
)
def test_recomputation_happens(
    recompute: str, attention: int, feed_forward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How often each layer's attention and feed-forward layer run in a step, and that evaluation runs them once."""
    model = make_gpt(ModelConfig(**SMALL), VOCAB, LENGTH, recompute=recompute)
    runs = {"attention": 0, "feed_forward": 0}

    def count(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def counted(*args: Any, **options: Any) -> Any:
            runs[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, method, counted)

    count(model.parts, "attention", "attention")
    for _, block in model.layers():
        count(block.feed_forward, "forward", "feed_forward")
    train_once(model)
    assert runs == {"attention": 2 * attention, "feed_forward": 2 * feed_forward}
    model.logits(make_ids()[:, 1:])
    assert runs == {"attention": 2 * attention + 2, "feed_forward": 2 * feed_forward + 2}


# -- dropout -------------------------------------------------------------------------------------------------------

RATES = ({"dropout": 0.3}, {"embedding_dropout": 0.3}, {"residual_dropout": 0.3}, {"attention_dropout": 0.3})


@pytest.mark.parametrize("rates", RATES)
def test_dropout_is_a_function_of_the_sample_alone(rates: dict[str, float]) -> None:
    """The same text as another sample has another mask; a sample has its own wherever it stands and beside whom."""
    config, ids = ModelConfig(**SMALL, **rates), make_ids(1).expand(3, -1)
    found = hidden_states(config, ids, NUMBERS)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not torch.allclose(found[0], found[2], atol=1e-3)
    moved = hidden_states(config, ids, NUMBERS[[2, 0, 1]])
    torch.testing.assert_close(moved, found[[2, 0, 1]], rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden_states(config, ids[:1], NUMBERS[1:2])[0], found[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rates", RATES)
def test_dropout_is_off_in_evaluation(rates: dict[str, float]) -> None:
    ids = make_ids()
    found = hidden_states(ModelConfig(**SMALL, **rates), ids, NUMBERS, training=False)
    plain = hidden_states(ModelConfig(**SMALL), ids, NUMBERS)
    assert torch.equal(found, plain)
    assert not torch.allclose(hidden_states(ModelConfig(**SMALL, **rates), ids, NUMBERS), plain, atol=1e-3)


def test_every_layer_and_place_of_a_layer_drops_by_its_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dropouts of one site would have one mask."""
    sites: list[int] = []

    def seen(keys: Tensor, site: int, *rest: Any) -> Tensor:
        sites.append(site)
        return keep_mask(keys, site, *rest)

    monkeypatch.setattr("kernels.attention.keep_mask", seen)
    monkeypatch.setattr("kernels.noise.keep_mask", seen)
    train_once(make_gpt(ModelConfig(**{**SMALL, "num_layers": 5}, dropout=0.1), VOCAB, LENGTH))
    assert len(sites) == len(set(sites)) == 1 + 3 * 5


def test_dropout_without_sample_keys_is_told() -> None:
    model = make_gpt(ModelConfig(**SMALL, dropout=0.1), VOCAB, LENGTH)
    ids = make_ids()
    with pytest.raises(ValueError, match=r"pass sample_keys, or call eval\(\)"):
        model(ids[:, :-1], ids[:, 1:], torch.ones(3, LENGTH), None)


def test_a_rank_of_a_cut_sequence_drops_its_rows_of_the_whole() -> None:
    x, keys = torch.randn(3, LENGTH, 16), sample_keys(1, NUMBERS)
    whole = drop(x, 0.4, keys, 3, Parts())
    for rank in range(4):
        rows = slice(rank * 3, rank * 3 + 3)
        assert torch.equal(drop(x[:, rows], 0.4, keys, 3, Parts(TensorAxis(4, rank, sequence=True))), whole[:, rows])


# -- first weights -------------------------------------------------------------------------------------------------


def first_weights(config: ModelConfig, seed: int = 1, vocab_size: int = VOCAB, **options: Any) -> Named:
    model = GPT(config, Parts(), vocab_size, LENGTH, **options)
    initialise(model, seed)
    return weights_of(model)


@pytest.mark.parametrize("layers", [2, 8])
@pytest.mark.parametrize("by_depth", [True, False])
def test_what_adds_to_the_residual_is_scaled_by_depth(layers: int, by_depth: bool) -> None:
    shape = {"num_layers": layers, "hidden_size": 64, "num_heads": 4, "initial_scale": 0.05}
    weights = first_weights(ModelConfig(**shape, scale_initial_by_depth=by_depth, tie_embeddings=False))
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert (weight == (1.0 if ".weight" in name else 0.0)).all(), f"{name}: norms begin at 1, biases at 0"
            continue
        residual = by_depth and name.endswith(("attention.out.weight", "feed_forward.down.weight"))
        expected = 0.05 / math.sqrt(2 * layers) if residual else 0.05
        error = expected / math.sqrt(2 * weight.numel())
        assert abs(weight.std().item() - expected) < 5 * error, name
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name


def test_first_weights_depend_on_seed_and_name_alone() -> None:
    config = ModelConfig(**SMALL, tie_embeddings=False, scale_initial_by_depth=False)
    weights = first_weights(config)
    deeper = first_weights(config.model_copy(update={"num_layers": 4}), vocab_size=VOCAB + 9)
    for name, weight in weights.items():
        assert torch.equal(deeper[name][: len(weight)], weight), name
    stage = first_weights(config, layers=range(1, 2), first=False)
    assert all(torch.equal(weight, weights[name]) for name, weight in stage.items())
    others = first_weights(config, seed=2)
    random = [name for name, weight in weights.items() if weight.dim() == 2]
    assert all(not torch.equal(weights[name], others[name]) for name in random)


def test_no_two_tensors_begin_alike() -> None:
    config = ModelConfig(**SMALL, tie_embeddings=False, scale_initial_by_depth=False)
    corners = [tuple(w[:2, :2].flatten().tolist()) for w in first_weights(config).values() if w.dim() == 2]
    assert len(set(corners)) == len(corners)


# -- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [8, 12])
def test_a_rank_has_the_slopes_of_its_heads(heads: int) -> None:
    shares = [local_slopes(heads, Parts(TensorAxis(4, rank))) for rank in range(4)]
    assert torch.equal(torch.cat(shares), alibi_slopes(heads))


def test_a_table_follows_the_device_but_keeps_float32() -> None:
    table = Table(torch.tensor([1.0, 1 / 3]))
    assert torch.equal(table.to(torch.bfloat16).values, torch.tensor([1.0, 1 / 3]))
    assert table.to("meta").values.device.type == "meta"
    assert not table.state_dict(), "made again, never saved"
