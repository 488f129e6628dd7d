"""Mixout against the paper's equation; that layouts and resumed runs agree: tests/pretrain/finetuning/test_trainable.py."""

from __future__ import annotations

import torch
from torch import nn

from parallel.axes import TensorAxis
from parallel.layers import Parts
from parallel.logical import view
from parallel.mixout import Mixout

RATE, ROWS, COLUMNS = 0.3, 48, 40


def mixed(axis: TensorAxis | None = None) -> tuple[nn.Parameter, Mixout]:
    """A fused product's weight of ones that began as twos."""
    weight = Parts(axis).column(COLUMNS, {"q": ROWS, "k": ROWS // 2}, False, 0.1).weight
    weight.data.fill_(1.0)
    return weight, Mixout({weight: "blocks.0.attention.qkv.weight"}, lambda _, p: torch.full_like(p, 2.0), RATE, seed=3)


def test_each_weight_is_the_first_one_or_pushed_away_from_it() -> None:
    """So that the mean over many steps is the weight itself, and its gradient's mean the gradient."""
    weight, mixout = mixed()
    total, gradients = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(200):
        weight.data.fill_(1.0)
        mixout.begin(step)
        first = weight.data == 2.0
        assert torch.allclose(weight.data[~first], torch.tensor((1.0 - RATE * 2.0) / (1.0 - RATE)))
        assert abs(first.float().mean() - RATE) < 0.05
        (3.0 * weight).sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad != 0, ~first) and torch.allclose(
            weight.grad[~first], torch.tensor(3.0 / (1 - RATE))
        )
        total, gradients, weight.grad = total + weight.data, gradients + weight.grad, None
    assert abs(total.mean() / 200 - 1.0) < 0.01 and abs(gradients.mean() / 200 - 3.0) < 0.03
    assert (total / 200 - 1.0).abs().max() < 0.25  # of a mean of 200, whose deviation is 0.046


def test_masks_are_of_the_step_and_the_place_in_the_logical_tensor() -> None:
    whole, mixout = mixed()
    mixout.begin(5)
    again, other = mixed()
    other.begin(5)
    assert torch.equal(again, whole)
    for rank in range(2):
        share, ours = mixed(TensorAxis(2, rank))
        ours.begin(5)
        for piece, all_of_it in zip(share.pieces, whole.pieces, strict=True):  # type: ignore[attr-defined]
            first, count = piece.offset[0], piece.size[0]
            assert torch.equal(view(share, piece), view(whole, all_of_it)[first : first + count])
    whole.data.fill_(1.0)
    mixout.begin(6)
    assert not torch.equal(again, whole)
