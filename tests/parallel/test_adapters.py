"""LoRA's factors against the formula of the paper; their shares under tensor parallelism: tests/parallel/test_layers.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.adapters import LoRA
from parallel.initial import initialise
from parallel.layers import Parts
from parallel.logical import logical_tensors, view

H, RANK, SCALE = 12, 3, 0.5
OUTPUTS = {"q": 16, "k": 8, "v": 8}


def column(dropout: float = 0.0) -> nn.Module:
    return Parts().column(H, OUTPUTS, True, 0.1, LoRA(("q", "v"), RANK, SCALE, dropout, site=9))


def filled(module: nn.Module) -> dict[str, Tensor]:
    """The logical tensors, all of them random."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return {name: view(parameter, piece) for name, piece, parameter in logical_tensors(nn.ModuleDict({"qkv": module}))}


def test_a_product_adds_its_targets_factors() -> None:
    layer = column()
    held = filled(layer)
    x = torch.randn(2, 5, H, generator=torch.Generator().manual_seed(2))
    expected = []
    for name in OUTPUTS:
        weight = held[f"{name}.weight"]
        if name != "k":
            weight = weight + SCALE * held[f"{name}.lora_b"] @ held[f"{name}.lora_a"]
        expected.append(F.linear(x, weight, held[f"{name}.bias"]))
    assert torch.allclose(layer(x), torch.cat(expected, dim=-1), atol=1e-5)
    row = Parts().row(H, 7, True, 0.1, LoRA(("out",), RANK, SCALE))
    filled(row)
    weight = row.weight + SCALE * row.lora_b @ row.lora_a  # type: ignore[operator]
    assert torch.allclose(row(x), F.linear(x, weight, row.bias), atol=1e-5)  # type: ignore[arg-type]


def test_it_begins_as_the_model_was_with_random_first_factors() -> None:
    plain, layer = Parts().column(H, OUTPUTS, True, 0.1), column()
    for module in (plain, layer):
        initialise(nn.ModuleDict({"qkv": module}), 7)
    x = torch.randn(2, 5, H)
    assert torch.equal(layer(x), plain(x))
    names = {name for name, _, _ in logical_tensors(nn.ModuleDict({"qkv": layer}))}
    assert {"q.lora_a", "q.lora_b", "v.lora_a", "v.lora_b"} < names and "k.lora_a" not in names
    wide = Parts().row(4096, 8, False, 0.1, LoRA(("out",), 64, SCALE))
    initialise(wide, 7)
    assert wide.lora_a.std().item() == pytest.approx((3 * 4096) ** -0.5, rel=0.01)  # type: ignore[operator, union-attr]


def test_its_dropout_is_of_training_alone_and_needs_keys() -> None:
    layer = column(dropout=0.5)
    filled(layer)
    x, keys = torch.randn(2, 5, H), torch.arange(2, dtype=torch.int32)
    dropped = layer(x, keys=keys)
    with pytest.raises(ValueError, match="needs the sample keys"):
        layer(x)
    layer.eval()
    assert torch.equal(layer(x), layer(x, keys=keys)) and not torch.allclose(layer(x), dropped)
    assert torch.allclose(layer(x)[..., 16:24], dropped[..., 16:24])  # k is no target
