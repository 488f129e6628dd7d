"""A model whose norms, rotary positions and activations Triton computes is the one in torch: loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.available import Chosen
from kernels.noise import sample_keys
from parallel.axes import TensorAxis
from parallel.initial import initialise
from parallel.layers import Parts
from pretrain.config.model import ModelConfig
from pretrain.models.gpt import GPT
from tests.kernels.workers import interpret

VOCAB, LENGTH = 50, 6
SHAPES: dict[str, dict[str, Any]] = {
    "pre, layer, gelu, biases": {"norm": "layer", "activation": "gelu"},
    "post, layer, geglu": {"norm": "layer", "activation": "geglu", "norm_position": "post", "biases": False},
    "post, rms, swiglu, biases": {"norm": "rms", "activation": "swiglu", "norm_position": "post"},
    "pre, rms, relu": {"norm": "rms", "activation": "relu", "biases": False},
}


def differences(shape: dict[str, Any], recompute: Any, dropout: float) -> dict[str, float]:
    """Relative, of the loss and the gradient of each weight, over two sequences of two documents each."""
    config = ModelConfig(
        num_layers=1, hidden_size=16, num_heads=4, num_kv_heads=2, ffn_hidden_size=20, positions="rope",
        initial_scale=0.2, dropout=dropout, attention_dropout=0.0, **shape,
    )  # fmt: skip
    ids = torch.randint(VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(4))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    found = []
    for chosen in (Chosen(), Chosen("torch", "triton", "triton", "triton")):
        model = GPT(config, Parts(kernels=chosen), VOCAB, LENGTH, recompute=recompute)
        initialise(model, 1)
        loss = model(ids[:, :-1], ids[:, 1:], torch.ones(2, LENGTH), sample_keys(1, torch.arange(2)), documents)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
    plain, ours = found
    return {name: ((ours[name] - want).norm() / (want.norm() + 1e-4)).item() for name, want in plain.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_in_torch(shape: str) -> None:
    found = interpret(differences, SHAPES[shape], "full" if "rms" in shape else "none", 0.2)
    assert len(found) >= 8 and max(found.values()) < 1e-5, found


def test_the_choice_reaches_every_part_also_where_the_tensor_axis_is_replaced() -> None:
    chosen = Chosen("torch", "triton", "triton", "triton")
    parts = Parts(TensorAxis(), kernels=chosen).picked
    assert parts.kernels == chosen
    assert parts.norm("rms", 4, 1e-5, False).backend == "triton" and parts.activation("gelu").backend == "triton"
