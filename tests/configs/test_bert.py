"""The shipped BERT configurations are the published models and schedule."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from pretrain.config.load import load_config
from pretrain.config.model import body_parameters, pooler_parameters
from pretrain.schedule import Plan
from tests.distributed import REPOSITORY

FOLDER = REPOSITORY / "configs/bert"


class Shape(NamedTuple):
    """Published: layers, hidden size and parameters in millions (Turc et al. 2019, table 1; Devlin et al. 2018, 3)."""

    layers: int
    hidden: int
    parameters: float
    counted: int  # of the published checkpoints: encoder with pooler


PUBLISHED = {
    "tiny": Shape(2, 128, 4.4, 4_385_920),
    "mini": Shape(4, 256, 11.3, 11_170_560),
    "small": Shape(4, 512, 29.1, 28_763_648),
    "medium": Shape(8, 512, 41.7, 41_373_184),
    "base": Shape(12, 768, 110.1, 109_482_240),
    "large": Shape(24, 1024, 340, 335_141_888),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_shape_and_parameters(name: str) -> None:
    shape, model = PUBLISHED[name], load_config(FOLDER / f"{name}.yaml").model
    assert (model.num_layers, model.hidden_size) == shape[:2]
    assert model.size_of_head == 64 and model.feed_forward_size == 4 * shape.hidden
    count = body_parameters(model, 30522, 512) + pooler_parameters(model)
    assert count == shape.counted
    assert count / 1e6 == pytest.approx(shape.parameters, rel=0.02)
    told = re.search(r"([\d.]+)M parameters", (FOLDER / f"{name}.yaml").read_text())
    assert told is not None and float(told[1]) == round(count / 1e6, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_papers_schedule(name: str) -> None:
    """Devlin et al. 2018, appendix A.2: 256 sequences of 512, a million steps, 1e-4 after 10,000 steps of warm-up, linear
    decay, 0.9 and 0.999, weight decay 0.01, dropout 0.1 everywhere, GELU; 15% masked, pairs half the time."""
    config = load_config(FOLDER / f"{name}.yaml")
    plan, optimizer, model = Plan(config), config.optimizer, config.model
    assert (config.batch.size, config.data.seq_length, plan.total_steps) == (256, 512, 1_000_000)
    first = 128 if name in ("base", "large") else 512  # "90% of the steps with sequence length of 128"
    assert [plan.seq_length(step) for step in (0, 899_999, 900_000, 999_999)] == [first, first, 512, 512]
    assert {plan.size(step) for step in (0, 899_999, 900_000)} == {256}
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.01)
    assert [plan.learning_rate(step) for step in (4_999, 9_999)] == pytest.approx([5e-5, 1e-4])
    assert plan.learning_rate(504_999) == pytest.approx(5e-5) and plan.learning_rate(999_999) == 0
    assert model.dropout == model.attention_dropout_rate == model.residual_dropout_rate == 0.1
    assert (model.activation, model.norm_position, model.kind) == ("gelu", "post", "bert")
    objective = config.objective
    assert (objective.mask_rate, objective.mask_share, objective.random_share, objective.pairs) == (
        0.15,
        0.8,
        0.1,
        "next",
    )
