"""What a schedule takes and gives, the same for a plain loop and for pipelines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.grid import start_grid
from parallel.layout import Layout
from parallel.stages import parameter_paths
from pretrain.build import build
from pretrain.sizes import Sizes
from tests.distributed import run_ranks
from tests.parallel.test_boxes import VOCABULARY, make_config
from tests.parallel.test_zero import batch_of_tokens

SCALE = 1 / 112  # four micro-batches of 28 targets


def gradients_of(text: str) -> list[list[Tensor]]:
    """This rank's gradients with the scale as a number, and as a tensor on the device."""
    layout = Layout.parse(text)
    grid = start_grid(layout, 60)
    config = make_config({axis: getattr(layout, axis) for axis in ("context", "pipeline", "virtual", "zero")}, "fp32")
    found = []
    for scale in (SCALE, torch.tensor(SCALE, device=grid.device)):
        built = build(config, grid, Sizes(VOCABULARY))
        built.train(True)
        built.schedule.run([batch_of_tokens()] * 4, scale=scale)
        found.append([parameter.grad for parameter in parameter_paths(built.stages) if parameter.grad is not None])
    return found


@pytest.mark.parametrize("layout", ["", "pp=2", "pp=2,vp=2"])
def test_the_scale_may_be_a_number_or_lie_on_the_device(layout: str) -> None:
    for number, tensor in run_ranks(Layout.parse(layout).size, gradients_of, layout):
        assert number and any(gradient.norm() > 1e-3 for gradient in number)
        for one, other in zip(number, tensor, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
