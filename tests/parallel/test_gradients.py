"""Sums and norms over ranks against the same on one process."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

from parallel.gradients import average, global_norm, sum_tied
from parallel.grid import start_grid
from parallel.layout import Layout
from tests.distributed import run_ranks

SIZES = [(3, 4), (7,), (2, 2), (11, 5), (1,)]


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=generator) for size in SIZES]


def averaged(buckets: list[int]) -> list[list[Tensor]]:
    grid = start_grid(Layout(data=3), 60)
    results = []
    for bucket in buckets:
        ours = gradients(grid.rank)
        with mock.patch("parallel.gradients.BUCKET", bucket):
            average(ours, grid.replica_group)
        results.append(ours)
    return results


def test_average_is_the_mean_over_replicas_whatever_the_buckets() -> None:
    replicas = [gradients(rank) for rank in range(3)]
    expected = [sum(parts) / 3 for parts in zip(*replicas, strict=True)]
    buckets = [1, 12, 20, 10**6]  # each alone, a few together, all in one
    for ours in (ours for results in run_ranks(3, averaged, buckets) for ours in results):
        for found, mean in zip(ours, expected, strict=True):
            assert torch.allclose(found, mean, rtol=1e-6, atol=1e-7)


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
