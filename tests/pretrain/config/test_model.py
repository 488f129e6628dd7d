"""The model's shape: its weights counted, its defaults, the nearest shape that works."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.layers import Parts
from pretrain.config.model import ModelConfig, nearest_divisor, parameter_count
from pretrain.models.gpt import GPT

VOCAB, LENGTH = 256, 16  # 128s: the model in memory has no padded rows then
SHAPES = {
    "gpt2": {"activation": "gelu-tanh"},
    "llama": {"positions": "rope", "norm": "rms", "activation": "swiglu", "biases": False, "num_kv_heads": 2},
    "2017": {"positions": "sinusoidal", "norm_position": "post", "activation": "relu", "ffn_hidden_size": 100},
    "untied": {"tie_embeddings": False, "positions": "none", "head_size": 5, "num_kv_heads": 1},
    "long": {"max_positions": 40, "norm": "rms", "activation": "geglu"},
    "bare": {"biases": False, "positions": "alibi", "tie_embeddings": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_parameter_count_is_that_of_the_model_in_memory(shape: str) -> None:
    config = ModelConfig.model_validate({"num_layers": 3, "hidden_size": 24, "num_heads": 4, **SHAPES[shape]})
    with torch.device("meta"):
        model = GPT(config, Parts(), VOCAB, LENGTH)
    assert parameter_count(config, VOCAB, LENGTH) == sum(parameter.numel() for parameter in model.parameters())


def test_gpt2_small_has_the_weights_that_are_known_of_it() -> None:
    """124,439,808: what every implementation of it reports."""
    gpt2 = ModelConfig(num_layers=12, hidden_size=768, num_heads=12)
    assert parameter_count(gpt2, 50257, 1024) == 124_439_808


def test_llama_7b_has_the_weights_that_are_known_of_it() -> None:
    """6,738,415,616 (Touvron et al. 2023: "6.7B"); its feed-forward size is 8/3 of the width, to the next multiple."""
    llama = ModelConfig(
        num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=11008, activation="swiglu", norm="rms",
        positions="rope", biases=False, tie_embeddings=False,
    )  # fmt: skip
    assert parameter_count(llama, 32000, 2048) == 6_738_415_616
    assert llama.model_copy(update={"ffn_hidden_size": None}).feed_forward_size == -(-8 * 4096 // 3 // 64) * 64


def test_windows_are_repeated_over_the_layers() -> None:
    config = ModelConfig(attention_window=[None, 8, 16])
    assert [config.window(layer) for layer in range(6)] == [None, 8, 16, None, 8, 16]
    assert ModelConfig(attention_window=4).window(3) == 4 and ModelConfig().window(3) is None


def test_a_dropout_rate_of_its_own_wins_over_the_common_one() -> None:
    config = ModelConfig(dropout=0.1, attention_dropout=0.0, embedding_dropout=0.3)
    rates = (config.attention_dropout_rate, config.embedding_dropout_rate, config.residual_dropout_rate)
    assert rates == (0.0, 0.3, 0.1)


@given(st.integers(1, 400), st.integers(1, 500))
def test_the_nearest_divisor_divides_and_none_is_nearer(number: int, wished: int) -> None:
    found = nearest_divisor(number, wished)
    assert number % found == 0
    assert all(number % d or abs(d - wished) >= abs(found - wished) for d in range(1, number + 1))


def test_the_nearest_divisor_of_a_large_number_takes_no_time() -> None:
    started = time.process_time()
    assert nearest_divisor(10**12, 7) == 8 and nearest_divisor(10**12, 10**13) == 10**12
    assert time.process_time() - started < 0.1
