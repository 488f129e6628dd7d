"""Rotary positions against complex multiplication, and their stretching against published formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kernels.rotary import SCALINGS, frequencies, rotary, rotary_angles, rotary_pair


def complex_rotation(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """x (B, S, N, D): feature pair (i, i + D/2) as a complex number, times exp(position base^(-2 i / D) sqrt(-1))."""
    half = x.shape[-1] // 2
    turns = torch.tensor([base ** (-2 * i / x.shape[-1]) for i in range(half)], dtype=torch.float64)
    angles = positions.double()[:, None] * turns
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)[:, None, :]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("size", [2, 8, 64])
def test_pairs_of_features_turn_as_complex_numbers(base: float, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, 30, 3, size, dtype=torch.float64, generator=generator, requires_grad=True)
    positions = torch.arange(5, 35)
    out = rotary(x, *rotary_angles(positions, size, base))
    expected = complex_rotation(x, positions, base)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # the angles are float32
    weights = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    found, wanted = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scaling", [None, *SCALINGS])
def test_products_of_queries_and_keys_depend_on_their_distance_alone(scaling: str | None) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = None if scaling is None else {"kind": scaling, "factor": 4.0}

    def product(query_at: int, key_at: int) -> float:
        cos, sin = rotary_angles(torch.tensor([query_at, key_at]), 16, 10000.0, options)
        return (rotary(q, cos[:1], sin[:1]) * rotary(k, cos[1:], sin[1:])).sum().item()

    for shift in (1, 100, 1000):
        assert product(7 + shift, 3 + shift) == pytest.approx(product(7, 3), abs=1e-4)
    assert product(8, 3) != pytest.approx(product(7, 3), abs=1e-3)


def test_turning_keeps_lengths_and_position_zero_stays() -> None:
    x = torch.randn(2, 40, 3, 16)
    out = rotary(x, *rotary_angles(torch.arange(40), 16))
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(out[:, 0], x[:, 0])


def test_a_pair_is_turned_by_the_rows_that_its_positions_name() -> None:
    q, k = (torch.randn(2, 6, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (3, 1))
    angles, positions = rotary_angles(torch.arange(6), 8), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0]])
    found = rotary_pair(q, k, *angles, positions)
    for x, out in zip((q, k), found, strict=True):
        for row in range(2):
            wanted = complex_rotation(x[row : row + 1], positions[row], 10000.0)
            torch.testing.assert_close(out[row : row + 1], wanted, rtol=0, atol=1e-5)
    for x, out in zip((q, k), rotary_pair(q, k, *angles), strict=True):
        assert torch.equal(out, rotary(x, *angles))
    assert torch.autograd.gradcheck(lambda q, k: rotary_pair(q, k, *angles, positions), (q, k))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 6, 3, 8), (2, 6, 1, 8), 6, 6, None), "heads of 8 need cos and sin of 4, found 3 and 3"),
        (((2, 6, 3, 8), (2, 5, 1, 8), 6, 8, None), "differ in more than their heads"),
        (((2, 6, 3, 8), (2, 6, 1, 8), 9, 8, None), "6 places need as many rows of angles, found 9: pass positions"),
        (((2, 6, 3, 8), (2, 6, 1, 8), 9, 8, (6,)), r"positions of \(2, 6\) are needed, found \(6,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_told(shapes: tuple[Any, ...], words: str) -> None:
    of_q, of_k, rows, size, of_positions = shapes
    positions = None if of_positions is None else torch.zeros(of_positions, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        rotary_pair(torch.zeros(of_q), torch.zeros(of_k), *rotary_angles(torch.arange(rows), size), positions)


def test_bfloat16_is_turned_in_float32() -> None:
    x = torch.randn(1, 50, 2, 32).bfloat16()
    angles = rotary_angles(torch.arange(50), 32)
    assert torch.equal(rotary(x, *angles), rotary(x.float(), *angles).bfloat16())


def published(kind: str, size: int, base: float, **options: float) -> Tensor:
    """transformers' frequencies for the same stretching."""
    config = LlamaConfig(hidden_size=2 * size, num_attention_heads=2, head_dim=size, rope_theta=base)
    config.rope_scaling = {"rope_type": kind, **options}
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("factor", "low", "high", "original"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (2.0, 0.5, 2.0, 512)]
)
def test_llama3_scaling_is_llama3s(size: int, factor: float, low: float, high: float, original: int) -> None:
    ours = {"kind": "llama3", "factor": factor, "low_frequency_factor": low, "high_frequency_factor": high}
    found = frequencies(size, 500000.0, {**ours, "original_positions": original})
    theirs = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    expected = published("llama3", size, 500000.0, factor=factor, **theirs)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    plain = frequencies(size, 500000.0)
    assert torch.equal(found[0], plain[0])
    assert found[-1] == pytest.approx(plain[-1] / factor)
    assert ((found < plain * 0.999) & (found > plain / factor * 1.001)).any(), "there is a ramp between"


def test_linear_scaling_divides_every_position() -> None:
    scaling = {"kind": "linear", "factor": 3.0}
    torch.testing.assert_close(frequencies(64, 10000.0, scaling), published("linear", 64, 10000.0, factor=3.0))
    stretched = rotary_angles(torch.arange(0, 90, 3), 64, 10000.0, scaling)
    for found, expected in zip(stretched, rotary_angles(torch.arange(30), 64), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_ntk_scaling_divides_the_slowest_frequency_and_keeps_the_fastest(factor: float) -> None:
    found = frequencies(64, 10000.0, {"kind": "ntk", "factor": factor})
    base = 10000.0 * factor ** (64 / 62)
    expected = torch.tensor([base ** (-2 * i / 64) for i in range(32)])
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert found[0] == 1.0
    assert found[-1].item() == pytest.approx(10000.0 ** (-62 / 64) / factor, rel=1e-5)


def test_frequencies_run_from_one_turn_of_a_radian_to_the_base() -> None:
    found = frequencies(128, 10000.0)
    assert found.shape == (64,)
    assert found[0] == 1.0
    assert math.log(found[-1].item()) == pytest.approx(-126 / 128 * math.log(10000), rel=1e-6)


@pytest.mark.parametrize(
    ("size", "scaling", "words"),
    [
        (7, None, "even head size, found 7"),
        (8, {"kind": "yarn"}, "'yarn': expected one of linear, ntk, llama3"),
        (2, {"kind": "ntk", "factor": 2.0}, "ntk .* more than 2"),
        (8, {"kind": "llama3", "low_frequency_factor": 4.0, "high_frequency_factor": 4.0}, "found 4.0 and 4.0"),
    ],
)
def test_mistakes_are_told(size: int, scaling: dict[str, Any] | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frequencies(size, 10000.0, scaling)
