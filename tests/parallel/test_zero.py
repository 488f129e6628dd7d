"""The engines where a gradient is not finite."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.adamw import AdamW
from parallel.engine import Step
from parallel.grid import start_grid
from parallel.layout import Layout
from parallel.stages import parameter_paths
from pretrain.build import Built, build
from pretrain.sizes import Sizes
from tests.distributed import run_ranks
from tests.parallel.test_boxes import VOCABULARY, make_config

RATE = 0.01


class After(NamedTuple):
    """What this rank holds after a step."""

    step: Step
    weights: list[Tensor]  # that the model computes with
    kept: list[Tensor]  # masters and moments
    updates: int


def take_step(built: Built, layout: Layout, spoil: float | None, rank: int) -> After:
    """One step on fixed tokens; on the last rank the gradient of one matrix becomes `spoil`."""
    built.train(True)
    handle = None
    if spoil is not None and rank == layout.size - 1:
        names = parameter_paths(built.stages)
        parameter = next(parameter for parameter, path in names.items() if path.endswith("down.weight"))
        handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, spoil))
    built.schedule.run([batch_of_tokens()] * 2, scale=1 / 56)  # two micro-batches of 28 targets
    if handle is not None:
        handle.remove()
    step = built.engine.step(RATE)
    weights = [parameter.detach().clone() for parameter in parameter_paths(built.stages)]
    kept = [flat.clone() for share in built.engine.shares() for flat in (share.master, *share.moments.values())]
    return After(step, weights, kept, built.engine.updates)


def steps(text: str, compute: str, spoils: list[list[float | None]]) -> list[list[After]]:
    """What this rank holds after each step of some trainings."""
    layout = Layout.parse(text)
    grid = start_grid(layout, 60)
    parallel = {axis: getattr(layout, axis) for axis in ("tensor", "pipeline", "zero")}
    config = make_config(parallel, compute)
    trainings = [(build(config, grid, Sizes(VOCABULARY)), of) for of in spoils]
    return [[take_step(built, layout, spoil, grid.rank) for spoil in of] for built, of in trainings]


def batch_of_tokens(length: int = 7) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randint(0, VOCABULARY, (2, 4, length), generator=generator)
    return inputs, targets, torch.ones(4, length), torch.zeros(4, dtype=torch.int32)


def accumulated(text: str) -> list[float]:
    """One gradient as the optimizer saw it, made of 1 and four times 1/1024: bfloat16 cannot add these."""
    layout = Layout.parse(text)
    grid = start_grid(layout, 60)
    built = build(make_config({"zero": layout.zero}, "bf16"), grid, Sizes(VOCABULARY))
    parts = iter([1.0, *[2.0**-10] * 4])
    names = parameter_paths(built.stages)
    parameter = next(parameter for parameter, path in names.items() if path.endswith("down.weight"))
    parameter.register_hook(lambda gradient: torch.full_like(gradient, next(parts)))
    built.train(True)
    built.schedule.run([batch_of_tokens()] * 5, scale=1 / 140)
    norm = built.engine.step(RATE).grad_norm.item()
    clipped = min(1.0, 1.0 / (norm + 1e-6)) * (1 - 0.9)
    moments = [share.moments["exp_avg"] for share in built.engine.shares() if share.parameter is parameter]
    return [number for flat in moments for number in (flat / clipped).tolist()]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("layout", "compute"),
    [
        ("", "fp32"),
        ("dp=2", "fp32"),
        ("dp=2", "bf16"),
        ("dp=2,zero=1", "fp32"),
        ("dp=2,zero=1", "bf16"),
        ("tp=2,pp=2", "fp32"),
        ("tp=2,pp=2,zero=1", "fp32"),
        ("tp=2,pp=2,zero=1", "bf16"),
    ],
)
def test_a_gradient_that_is_not_finite_skips_the_step_everywhere(layout: str, compute: str) -> None:
    world = Layout.parse(layout).size
    for spoiled, plain in run_ranks(world, steps, layout, compute, [[None, torch.inf, torch.nan, None], [None, None]]):
        first, infinite, undefined, last = spoiled
        assert first.step.applied and first.updates == 1
        for after in (infinite, undefined):
            assert not after.step.applied and not math.isfinite(after.step.grad_norm)
            assert same(after.weights, first.weights) and same(after.kept, first.kept) and after.updates == 1
        # And the next step is what it would have been without those two.
        assert last.step == plain[1].step and last.step.applied and last.updates == 2
        assert same(last.weights, plain[1].weights) and same(last.kept, plain[1].kept)
        assert not same(last.weights, first.weights)


@pytest.mark.parametrize("layout", ["", "zero=1", "dp=2,zero=1"])
def test_gradients_are_added_up_and_reduced_in_float32_under_bf16(layout: str) -> None:
    found = [number for numbers in run_ranks(Layout.parse(layout).size, accumulated, layout) for number in numbers]
    assert len(found) == 9 * 10
    assert all(abs(number - (1 + 4 / 1024)) < 1e-4 for number in found)


def steps_of_the_optimizer(text: str, compute: str) -> tuple[list[tuple[int, int]], bool]:
    """Its launches and updates after each of two steps, and whether it is all that could have stepped."""
    layout = Layout.parse(text)
    grid = start_grid(layout, 60)
    parallel = {"zero": layout.zero, "offload": layout.offload}
    built = build(make_config(parallel, compute), grid, Sizes(VOCABULARY))
    optimizer = built.engine.optimizer  # type: ignore[attr-defined]
    given = getattr(built.engine, "zero", None)
    found = []
    for _ in range(2):
        take_step(built, layout, None, grid.rank)
        found.append((optimizer.launches, built.engine.updates))
    return found, type(optimizer) is AdamW and (given is None or given.optimizer is optimizer)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=2,offload", "dp=2,zero=3"])
def test_our_optimizer_is_what_steps_at_every_stage(layout: str, compute: str) -> None:
    """In one launch, or in one for each of its two groups where DeepSpeed steps them one by one; one update each time."""
    one_by_one = "zero" in layout and (layout, compute) != ("dp=2,zero=1", "bf16")
    for found, ours in run_ranks(Layout.parse(layout).size, steps_of_the_optimizer, layout, compute):
        assert ours and found == ([(2, 1), (4, 2)] if one_by_one else [(1, 1), (2, 2)])
