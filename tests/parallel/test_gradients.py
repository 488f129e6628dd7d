"""Sums and norms over ranks against the same on one process."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from parallel.gradients import global_norm, is_sliced, sum_tied
from parallel.grid import start_grid
from parallel.layout import Layout
from parallel.stages import parameter_paths
from pretrain.build import build
from pretrain.sizes import Sizes
from tests.distributed import run_ranks
from tests.parallel.test_boxes import VOCABULARY, make_config
from tests.parallel.test_zero import batch_of_tokens

SIZES = [(3, 4), (7,), (2, 2), (11, 5), (1,)]


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=generator) for size in SIZES]


def model_norm() -> tuple[float, float]:
    """The norm of a model that is spread over 2 tensor ranks x 2 stages, each element with another value; its tied
    embedding lies on both stages. And a copy of the tied gradient's sum."""
    grid = start_grid(Layout(tensor=2, pipeline=2), 60)
    cut, replicated, tied = (nn.Parameter(torch.empty(size)) for size in (3, 5, 2))
    for share in (cut, tied):
        share.tensor_model_parallel = True  # type: ignore[attr-defined]
    if grid.last_stage:
        tied.ds_pipe_replicated = True  # type: ignore[attr-defined]
    values = [
        torch.full((3,), 1.0 + grid.rank),  # this rank's own
        torch.full((5,), 10.0 + grid.stage),  # the same on the tensor ranks of a stage
        torch.full((2,), 0.5 * (1 + grid.stage)),  # each stage's part of the tied gradient
    ]
    tied.grad = values[2]
    sum_tied(tied, grid.embedding_group)
    return global_norm([cut, replicated, tied], values, grid.tensor.rank, grid.model_group).item(), tied.grad[0].item()


def test_global_norm_counts_every_logical_element_once() -> None:
    elements = [value for rank in range(4) for value in [1.0 + rank] * 3]
    elements += [value for stage in range(2) for value in [10.0 + stage] * 5]
    elements += [0.5 + 1.0] * 4  # two on each tensor rank, the stages' parts added up
    expected = torch.tensor(elements, dtype=torch.float64).norm().item()
    for norm, tied in run_ranks(4, model_norm):
        assert abs(norm / expected - 1) < 1e-6 and tied == 1.5


def test_one_process_has_nothing_to_sum() -> None:
    parameters = [nn.Parameter(torch.empty(size)) for size in SIZES]
    expected = torch.cat([gradient.flatten() for gradient in gradients(1)]).norm()
    assert torch.allclose(global_norm(parameters, gradients(1), 0, None).float(), expected)
    parameters[0].grad = torch.ones(3, 4)
    sum_tied(parameters[0], None)
    assert parameters[0].grad.eq(1).all()


# -- under sequence parallelism ----------------------------------------------------------------------------------------


def sums_of_a_step(text: str, compute: str, micro_batches: int) -> tuple[list[int], list[int], int]:
    """Sizes of all sums over the tensor ranks in a step; sizes of the parameters that saw a slice; how many elements of
    theirs this rank keeps gradients of."""
    layout = Layout.parse(text)
    grid = start_grid(layout, 60)
    axes = ("tensor", "sequence", "pipeline", "virtual", "zero")
    config = make_config({axis: getattr(layout, axis) for axis in axes}, compute)
    config = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 8})})
    built = build(config, grid, Sizes(VOCABULARY))
    built.train(True)
    found: list[int] = []
    original = torch.distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        if group is grid.tensor.group:
            found.append(tensor.numel())
        return original(tensor, *args, group=group, **options)

    with mock.patch("torch.distributed.all_reduce", all_reduce):
        built.schedule.run([batch_of_tokens(8)] * micro_batches, scale=1 / 100)
        built.engine.step(0.01)
    sliced = [p for p in parameter_paths(built.stages) if is_sliced(p)]
    kept = sum(s.numel for s in built.engine.shares() if is_sliced(s.parameter))
    if layout.zero == 1:  # where gradients are still whole
        kept = sum(p.numel() for p in sliced)
    return found, [math.prod(p.local_shape) for p in sliced], kept  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("layout", "compute"),
    [
        ("tp=2,sp", "fp32"),
        ("tp=2,sp", "bf16"),
        ("tp=2,sp,pp=2,vp=2", "fp32"),
        ("tp=2,sp,dp=2,zero=1", "fp32"),
        ("tp=2,sp,dp=2,zero=1", "bf16"),
        ("tp=2,sp,dp=2,zero=2", "fp32"),
        ("tp=2,sp,dp=2,zero=2", "bf16"),
        ("tp=2,sp,dp=2,zero=3", "bf16"),
    ],
)
def test_gradients_of_slices_are_summed_in_one_reduction_a_step(layout: str, compute: str) -> None:
    """However many parameters and micro-batches there are. The other sums are the loss's: two numbers for each of 4 x 8
    tokens, or less."""
    for found, sizes, kept in run_ranks(Layout.parse(layout).size, sums_of_a_step, layout, compute, 4):
        assert len(sizes) > 8 and min(sizes) == 9 and kept > 2 * 4 * 8
        of_gradients = [size for size in found if size > 2 * 4 * 8 or size in sizes]
        if "zero=3" in layout:  # an odd parameter's last part is padded
            assert len(of_gradients) == 1 and kept <= of_gradients[0] <= kept + len(sizes)
        else:
            assert of_gradients == [kept]
