"""Model FLOPs against a count by hand, and peaks only of devices whose peak is known."""

from __future__ import annotations

import pytest
import torch

from pretrain.config.model import ModelConfig
from pretrain.flops import flops_per_token, peak_flops

GPT2 = ModelConfig(num_layers=12, hidden_size=768, num_heads=12)
V, T, H, F, L = 50257, 1024, 768, 3072, 12
MATRICES = (
    L * (H * 3 * H + H * H + H * F + F * H) + H * V
)  # multiply each token once forward, twice backward, 2 FLOPs each
VECTORS = L * (3 * H + H + F + H + 4 * H) + 2 * H  # biases and norms: a thousandth, counted as weights in 6 N too


def test_gpt2_small_matches_a_count_by_hand() -> None:
    scores = (
        L * 3 * (2 * T * H + 2 * T * H)
    )  # q k^T and its product with v: T keys of H features each, 3 times as above
    assert flops_per_token(GPT2, V, T) == 6 * (MATRICES + VECTORS) + scores
    assert VECTORS < 1e-3 * MATRICES


def test_a_window_counts_only_the_keys_that_it_shows() -> None:
    windowed = GPT2.model_copy(update={"attention_window": [None, 256, 5000]})
    keys = [T, 256, T] * 4  # the window of 5,000 shows no more than there is
    difference = flops_per_token(GPT2, V, T) - flops_per_token(windowed, V, T)
    assert difference == 12 * H * sum(T - shown for shown in keys)


def test_an_embedding_costs_nothing_and_an_output_layer_does() -> None:
    untied = GPT2.model_copy(update={"tie_embeddings": False})
    assert flops_per_token(untied, V, T) == flops_per_token(GPT2, V, T)
    rope = GPT2.model_copy(update={"positions": "rope"})  # a learned table of positions is a look-up too
    assert flops_per_token(rope, V, T) == flops_per_token(GPT2, V, T)


def test_shared_key_heads_save_weights_but_no_scores() -> None:
    grouped = GPT2.model_copy(update={"num_kv_heads": 4})
    saved = L * 2 * (H - H // 3) * (H + 1)  # of the key and value projections, with their biases
    assert flops_per_token(GPT2, V, T) - flops_per_token(grouped, V, T) == 6 * saved


def peak_of(monkeypatch: pytest.MonkeyPatch, name: str, compute: str = "bf16") -> float | None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return peak_flops(torch.device("cuda"), compute, None)


# Dense bfloat16 (half of what the data sheets give with sparsity).
@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA A40", 150), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71),
    ],
)  # fmt: skip
def test_known_devices_have_their_data_sheets_peak(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float) -> None:
    assert peak_of(monkeypatch, name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A10M", "Tesla V100-SXM2-32GB", "",
    ],
)  # fmt: skip
def test_devices_that_are_not_known_have_no_peak(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert peak_of(monkeypatch, name) is None


def test_a_peak_is_that_of_the_precision_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of(monkeypatch, "NVIDIA H100 80GB HBM3", compute="fp32") is None


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_a_cpu_has_a_peak_only_if_it_is_given(compute: str) -> None:
    assert peak_flops(torch.device("cpu"), compute, None) is None
    assert peak_flops(torch.device("cpu"), compute, 1.5) == 1.5e12
