"""The mean over replicas: right whatever the buckets and the order of gradients, and on its way in the last backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from parallel.averaging import Averaging, buckets_of
from parallel.grid import start_grid
from parallel.layout import Layout
from parallel.stages import parameter_paths
from pretrain.build import build
from pretrain.sizes import Sizes
from tests.distributed import run_ranks
from tests.parallel.test_boxes import VOCABULARY, make_config
from tests.parallel.test_gradients import SIZES, gradients
from tests.parallel.test_zero import batch_of_tokens

SMALL = 200  # elements a bucket: half a layer of the tiny model
MICRO_BATCHES = 4


def averaged(sizes: list[int], micro_batches: int) -> list[list[Tensor]]:
    """Gradients of a sum over all parameters, each replica's in another order; for several sizes of buckets."""
    grid = start_grid(Layout(data=3), 60)
    results = []
    for size in sizes:
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in SIZES]
        with mock.patch("parallel.averaging.BUCKET", size):
            averaging = Averaging(list(buckets_of(parameters)), grid.replica_group)
        for number in range(micro_batches):
            ours = gradients(grid.rank + 3 * number)
            terms = [(p * g).sum() for p, g in zip(parameters, ours, strict=True)]
            order = terms[grid.rank :] + terms[: grid.rank]
            if number < micro_batches - 1:
                with averaging:
                    torch.stack(order).sum().backward()
            else:
                for term in order:  # one after the other, so that gradients come in this order
                    term.backward()
        averaging.finish()
        results.append([parameter.grad for parameter in parameters])
    return results


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_mean_over_replicas_is_right_whatever_the_buckets_and_the_order(micro_batches: int) -> None:
    each = [gradients(number) for number in range(3 * micro_batches)]
    expected = [sum(parts) / 3 for parts in zip(*each, strict=True)]
    sizes = [1, 12, 20, 10**6]  # each parameter alone, a few together, all in one
    for ours in (ours for results in run_ranks(3, averaged, sizes, micro_batches) for ours in results):
        for found, mean in zip(ours, expected, strict=True):
            assert torch.allclose(found, mean, rtol=1e-6, atol=1e-6)


def add_after_the_last() -> None:
    grid = start_grid(Layout(data=2), 60)
    parameter = nn.Parameter(torch.zeros(3))
    Averaging([[parameter]], grid.replica_group)
    for _ in range(2):
        parameter.sum().backward()


def test_a_gradient_that_comes_after_the_last_is_an_error_and_not_lost() -> None:
    with pytest.raises(AssertionError, match="added to after it had been sent"):
        run_ranks(2, add_after_the_last)


class Sent(NamedTuple):
    """When a bucket was sent."""

    forwards: int  # of this rank's stages, in this step
    missing: int  # gradients that the last backward pass had not made yet
    in_step: bool  # the backward passes were over


class Trained(NamedTuple):
    sent: list[list[Sent]]  # of each step
    kept: list[Tensor]  # masters and moments after the last


def train(text: str, compute: str, steps: int) -> Trained:
    """A few steps with small buckets, watching when each is sent."""
    layout = Layout.parse(text)
    grid = start_grid(layout, 60)
    with mock.patch("parallel.averaging.BUCKET", SMALL):
        axes = ("tensor", "context", "pipeline", "virtual", "zero")
        built = build(make_config({axis: getattr(layout, axis) for axis in axes}, compute), grid, Sizes(VOCABULARY))
    averaging: Averaging = built.engine.averaging  # type: ignore[attr-defined]
    forwards, in_step, sent = [0], [False], []
    for stage in built.stages:
        stage.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    original = averaging._send

    def send() -> None:
        sent[-1].append(Sent(forwards[0], sum(averaging.missing), in_step[0]))
        original()

    averaging._send = send  # type: ignore[method-assign]
    built.train(True)
    batches: list[Any] = [batch_of_tokens()] * MICRO_BATCHES
    for _ in range(steps):
        sent.append([])
        forwards[0], in_step[0] = 0, False
        built.schedule.run(batches, scale=1 / 100)
        built.schedule.run(batches, scale=1.0, forward_only=True)  # a validation changes nothing
        in_step[0] = True
        built.engine.step(0.01)
    kept = [flat.clone() for share in built.engine.shares() for flat in (share.master, *share.moments.values())]
    assert len(averaging.buckets) > 2 and len(averaging.number_of) == len(parameter_paths(built.stages))
    return Trained(sent, kept)


@pytest.mark.parametrize(
    ("layout", "compute"),
    [
        ("dp=2", "fp32"),
        ("dp=2", "bf16"),
        ("dp=2,zero=1", "bf16"),
        ("pp=2,dp=2", "fp32"),
        ("pp=2,vp=2,dp=2", "bf16"),
        ("tp=2,pp=2,dp=2,zero=1", "bf16"),
    ],
)
def test_buckets_are_sent_during_the_last_backward_pass(layout: str, compute: str) -> None:
    wanted = Layout.parse(layout)
    for trained in run_ranks(wanted.size, train, layout, compute, 2):
        for sent in trained.sent:
            assert not any(bucket.in_step for bucket in sent), "one was left for the step"
            assert sent[0].missing > sent[-1].missing == 0, "the first has to go before the last gradient is there"
            overlapped = sum(bucket.missing > 0 for bucket in sent)
            assert overlapped >= len(sent) / 2
            if wanted.virtual == 1:  # with more, a rank's last part is done before its first
                assert {bucket.forwards for bucket in sent} == {MICRO_BATCHES}


@pytest.mark.parametrize(("layout", "compute"), [("dp=3", "fp32"), ("pp=2,dp=2", "bf16"), ("dp=3,zero=1", "bf16")])
def test_training_with_it_repeats_bitwise_and_replicas_stay_equal(layout: str, compute: str) -> None:
    wanted = Layout.parse(layout)
    one, two = (run_ranks(wanted.size, train, layout, compute, 3) for _ in range(2))
    for ours, again in zip(one, two, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.kept, again.kept, strict=True))
    if wanted.zero == 0:
        for stage in range(wanted.pipeline):
            replicas = one[stage * wanted.data : (stage + 1) * wanted.data]
            for other in replicas[1:]:
                assert all(torch.equal(a, b) for a, b in zip(replicas[0].kept, other.kept, strict=True))
