"""Model FLOPs against a count of the products that a real model makes, and peaks only of devices whose peak is known."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parallel.axes import ContextAxis, TensorAxis
from parallel.layers import Parts
from pretrain.config.model import ModelConfig, parameter_count
from pretrain.flops import flops_per_token, hardware_flops_per_token, peak_flops, visible_pairs
from pretrain.models.bert import BERT
from pretrain.models.gpt import GPT

GPT2 = ModelConfig(num_layers=12, hidden_size=768, num_heads=12)
V, T, H, F, L = 50257, 1024, 768, 3072, 12
MATRICES = (
    L * (H * 3 * H + H * H + H * F + F * H) + H * V
)  # multiply each token once forward, twice backward, 2 FLOPs each
KEYS = (T + 1) / 2  # that a query sees, in the mean

# Grouped heads, three feed-forward matrices; an untied head; heads wider than the model. ALiBi has no fused attention, so
# its two products are counted as such.
SMALL = {
    "grouped": {"activation": "swiglu", "num_kv_heads": 2, "norm": "rms", "biases": False},
    "untied": {"tie_embeddings": False, "max_positions": 100},
    "wide heads": {"head_size": 24, "ffn_hidden_size": 40},
}
Recompute = Literal["none", "selective", "full"]


def small(kind: str) -> ModelConfig:
    return ModelConfig.model_validate(
        {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "positions": "alibi", **SMALL[kind]}
    )


def counted(model: ModelConfig, length: int, recompute: Recompute) -> tuple[float, float]:
    """FLOPs a token, forward and backward, of the products with weights and of attention's, as torch counts them."""
    gpt = GPT(model, Parts(TensorAxis(), ContextAxis()), 512, length, recompute=recompute)
    for parameter in gpt.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    ids, rows = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        gpt(ids, ids, torch.ones(2, length), rows).backward()
    found = {str(name): count / ids.numel() for name, count in counter.get_flop_counts()["Global"].items()}
    assert found.keys() == {"aten.mm", "aten.addmm", "aten.bmm"} - ({"aten.addmm"} if not model.biases else set())
    return found["aten.mm"] + found.get("aten.addmm", 0.0), found["aten.bmm"]


@pytest.mark.parametrize("kind", SMALL)
def test_products_are_those_that_a_real_model_makes(kind: str) -> None:
    """Up to 64 tokens the plain attention multiplies the whole square, of which the mask leaves (S + 1) / 2 S."""
    model, length = small(kind), 48
    weights, square = counted(model, length, "none")
    assert flops_per_token(model, 512, length) == weights + square * (length + 1) / 2 / length


@pytest.mark.parametrize("kind", SMALL)
def test_recomputation_is_counted_but_for_the_last_product_which_torch_leaves_out(kind: str) -> None:
    model, length = small(kind), 48
    weights, square = counted(model, length, "none")
    more = {name: counted(model, length, name) for name in ("selective", "full")}
    down = model.num_layers * 2 * model.feed_forward_size * model.hidden_size
    visible = (length + 1) / 2 / length

    def hardware(recompute: Recompute) -> float:
        return hardware_flops_per_token(model, 512, length, recompute) - flops_per_token(model, 512, length)

    assert hardware("none") == 0
    assert more["selective"][0] == weights, "no product with a weight is made again"
    assert hardware("selective") == pytest.approx(2 * (more["selective"][1] - square) * visible)
    made_again = more["full"][0] - weights + (more["full"][1] - square) * visible
    assert hardware("full") == pytest.approx(made_again + down)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("window", [None, 1, 2, 6, 64, 100])
def test_visible_pairs_are_those_of_the_mask(length: int, window: int | None, causal: bool) -> None:
    places = torch.arange(length)
    distance = places[:, None] - places[None, :]
    mask = (distance.abs() < (window or length)) & ((distance >= 0) | (not causal))
    assert visible_pairs(length, window, causal) == int(mask.sum())


@pytest.mark.parametrize("pairs", [True, False])
def test_an_encoders_products_are_those_that_a_real_model_makes(pairs: bool) -> None:
    """The pairs' head is left out: two products of one position a sequence."""
    model = small("untied").model_copy(update={"kind": "bert"})
    bert, (rows, length, places) = BERT(model, Parts(), 512, 48, pairs=pairs), (2, 48, 8)
    for parameter in bert.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    ids, targets, ones = torch.zeros(rows, length).long(), torch.zeros(rows, places).long(), torch.ones(rows)
    arguments = (ids, targets, torch.ones(rows, places), None, None, ids, targets, targets[:, 0], ones)
    with FlopCounterMode(display=False) as counter:
        bert(*arguments).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    left_out = 6 * rows * 32 * (32 + 2) if pairs else 0
    assert flops_per_token(model, 512, length, places / length) * rows * length == sum(counts.values()) - left_out


def test_gpt2_small_matches_a_count_by_hand() -> None:
    scores = L * 3 * (2 * KEYS * H + 2 * KEYS * H)  # q k^T and its product with v, 3 times as above
    assert flops_per_token(GPT2, V, T) == 6 * MATRICES + scores


def test_a_window_counts_only_the_keys_that_it_shows() -> None:
    windowed = GPT2.model_copy(update={"attention_window": [None, 256, 5000]})
    shown = (sum(range(1, 257)) + (T - 256) * 256) / T  # the window of 5,000 shows no more than there is
    difference = flops_per_token(GPT2, V, T) - flops_per_token(windowed, V, T)
    assert difference == 12 * H * 4 * (KEYS - shown)


def test_look_ups_cost_nothing_and_an_output_layer_does() -> None:
    untied = GPT2.model_copy(update={"tie_embeddings": False})
    assert flops_per_token(untied, V, T) == flops_per_token(GPT2, V, T)
    rope = GPT2.model_copy(update={"positions": "rope"})  # a learned table of positions is a look-up too
    assert flops_per_token(rope, V, T) == flops_per_token(GPT2, V, T)
    assert flops_per_token(GPT2, V + 1, T) - flops_per_token(GPT2, V, T) == 6 * H


def palm(model: ModelConfig, length: int) -> float:
    """6 N + 12 L H Q T (Chowdhery et al. 2022, appendix B), N without the table of positions."""
    weights = parameter_count(model, V, length) - length * model.hidden_size
    return 6 * weights + 12 * model.num_layers * model.num_heads * model.size_of_head * length


def test_palms_formula_gives_what_the_docstring_says() -> None:
    gpt3 = ModelConfig(num_layers=96, hidden_size=12288, num_heads=96)
    assert palm(gpt3, 2048) / flops_per_token(gpt3, V, 2048) == pytest.approx(1.014, abs=5e-4)
    assert palm(GPT2, 1024) / flops_per_token(GPT2, V, 1024) == pytest.approx(1.072, abs=5e-4)


# -- peaks -----------------------------------------------------------------------------------------------------------


def peak_of(monkeypatch: pytest.MonkeyPatch, name: str, compute: str = "bf16") -> float | None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    return peak_flops(torch.device("cuda"), compute, None)


# Dense bfloat16 (half of what the data sheets give with sparsity).
@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA H800", 989), ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H20", 148), ("NVIDIA B200", 2250), ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A800-SXM4-80GB", 312), ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA A40", 150), ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)  # fmt: skip
def test_known_devices_have_their_data_sheets_peak(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float) -> None:
    assert peak_of(monkeypatch, name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA RTX A6000", "Quadro RTX 6000",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "NVIDIA RTX 5000 Ada Generation Laptop GPU", "NVIDIA GB200",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti", "NVIDIA A10M", "Tesla V100-SXM2-32GB", "",
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


def test_a_given_peak_comes_before_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bf16", 500.0) == 500e12
