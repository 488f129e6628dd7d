"""The shipped encoder-decoders: the 2017 Transformer to its paper's numbers, and T5 v1.1's shape."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from pretrain.config.load import load_config
from pretrain.config.model import pair_parameters
from pretrain.config.run import Config
from pretrain.huggingface.architecture import settings_of
from pretrain.huggingface.architectures import architecture_of
from pretrain.schedule import Plan
from tests.distributed import REPOSITORY

FOLDER = REPOSITORY / "configs/transformer"
VOCAB = 37000  # "a shared source-target vocabulary of about 37000 tokens"
CHUNK = 2**19  # tokens


class Row(NamedTuple):
    """A row of Table 3 (Vaswani et al. 2017), with the parameters in millions, as printed and as counted."""

    layers: int
    width: int
    inner: int
    heads: int
    dropout: float
    steps: int
    printed: float
    counted: float


TABLE = {
    "base": Row(6, 512, 2048, 8, 0.1, 100_000, 65, 63.1),
    "big": Row(6, 1024, 4096, 16, 0.3, 300_000, 213, 214.2),
}
ROWS = [pytest.param(name, row, id=name) for name, row in TABLE.items()]


def config_of(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_preset_has_its_rows_shape(name: str, row: Row) -> None:
    model = config_of(name).model
    assert (model.num_layers, model.layers_of_decoder) == (row.layers, row.layers)
    assert (model.hidden_size, model.feed_forward_size, model.num_heads) == (row.width, row.inner, row.heads)
    assert model.size_of_head == model.hidden_size / model.num_heads == 64
    assert (model.kind, model.activation, model.norm, model.norm_position) == (
        "encoder-decoder", "relu", "layer", "post",
    )  # fmt: skip
    assert model.positions == "sinusoidal" and model.biases and model.tie_embeddings and model.scale_embeddings
    assert model.embedding_dropout_rate == model.residual_dropout_rate == row.dropout
    assert model.attention_dropout_rate == 0.0  # "to the output of each sub-layer", and "to the sums of the embeddings"
    assert model.initial_scale == pytest.approx(row.width**-0.5, rel=1e-3)  # scaled embeddings have unit variance


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_preset_has_the_papers_number_of_parameters(name: str, row: Row) -> None:
    """By a count of its own: an attention has 4 H^2 weights and 4 H biases, a feed-forward layer 2 H F, F and H, a norm 2 H;
    an encoder's layer has one attention, a decoder's two, and each sub-layer a norm."""
    H, F = row.width, row.inner
    attention, forward, norm = 4 * H * H + 4 * H, 2 * H * F + F + H, 2 * H
    counted = VOCAB * H + row.layers * (3 * attention + 2 * forward + 5 * norm)
    assert pair_parameters(config_of(name).model, VOCAB, (128, 128)) == counted
    assert round(counted / 1e6, 1) == row.counted and counted / 1e6 == pytest.approx(row.printed, rel=0.03)
    told = (FOLDER / f"{name}.yaml").read_text()
    assert f": {row.counted}M parameters" in told and f"(the paper's {row.printed}M, table 3)" in told


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_preset_has_the_papers_schedule(name: str, row: Row) -> None:
    """Section 5: about 25,000 tokens of either side, Adam 0.9/0.98/1e-9, 4,000 steps of warm-up, label smoothing 0.1."""
    config = config_of(name)
    plan, optimizer, objective = Plan(config), config.optimizer, config.objective
    peak = row.width**-0.5 * 4000**-0.5
    assert f"{optimizer.learning_rate:.3e}" == f"{peak:.3e}"
    for step in (1, 2000, 4000, 4001, 16_000, row.steps):
        wanted = row.width**-0.5 * min(step**-0.5, step * 4000**-1.5)  # equation 3
        assert plan.learning_rate(step - 1) == pytest.approx(wanted, rel=1e-3), step
    assert (optimizer.betas, optimizer.epsilon) == ((0.9, 0.98), 1e-9)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.0, 0.0)
    assert (objective.kind, objective.label_smoothing, plan.total_steps) == ("sequence-to-sequence", 0.1, row.steps)
    source, target = objective.lengths(config.data.seq_length)
    assert source * config.batch.size == target * config.batch.size == pytest.approx(25_000, rel=0.02)
    averaged = re.search(r"average RUN --last (\d+)", (FOLDER / f"{name}.yaml").read_text())
    assert averaged is not None and int(averaged[1]) == config.checkpoint.keep_last  # "the last 5", "the last 20"


@pytest.mark.parametrize("name", ["base", "big", "demo"])
def test_the_2017_model_can_be_exported(name: str) -> None:
    config = config_of(name)
    assert architecture_of(settings_of(config.model, VOCAB, 128)).model_type == "marian"


def test_the_demo_is_the_2017_model_in_small() -> None:
    demo, base = config_of("demo"), config_of("base")
    same = ("kind", "activation", "positions", "norm", "norm_position", "scale_embeddings", "tie_embeddings", "biases")
    assert [getattr(demo.model, name) for name in same] == [getattr(base.model, name) for name in same]
    assert demo.objective.kind == "sequence-to-sequence" and demo.objective.lengths(demo.data.seq_length) == (64, 64)
    assert demo.model.initial_scale == pytest.approx(128**-0.5, rel=1e-3)


def test_the_t5_style_model_is_t5_small_but_for_its_positions() -> None:
    """google/t5-v1_1-small has 76,961,152 parameters, 384 of them in its relative positions (32 buckets, 6 heads, twice)."""
    config = config_of("t5-style-small")
    model, objective = config.model, config.objective
    assert (model.norm, model.norm_position, model.positions, model.activation) == ("rms", "pre", "rope", "geglu")
    assert not model.biases and model.vocab_size == 32128
    assert pair_parameters(model, 32128, objective.lengths(512)) == 76_961_152 - 384
    assert "77.0M parameters" in (FOLDER / "t5-style-small.yaml").read_text()
    assert CHUNK % config.data.seq_length == 0, "no token of a chunk is left over"
    assert (objective.kind, objective.noise_rate, objective.noise_span) == ("span-corruption", 0.15, 3.0)
    assert objective.spans(512)[1] <= objective.sentinels == 100 and model.vocab_size >= 32000 + 100
    plan = Plan(config)
    rates = [plan.learning_rate(step) for step in (9_999, 39_999)]
    assert rates == pytest.approx([1e-3, 0.5e-3], rel=1e-3) and plan.total_steps == 2**19
