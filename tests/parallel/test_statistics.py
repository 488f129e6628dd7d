"""Norms and histograms of weights and gradients: against torch on one process, and the same under every layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.boxes import whole_tensors
from parallel.layout import Layout
from parallel.stages import parameter_paths
from parallel.statistics import Histogram, Meter, histogram, spread, squares
from pretrain.gauges import Histograms, Norms, layer_of
from pretrain.report import Silent
from tests.distributed import run_ranks
from tests.training import start_run, write_config

STEPS = 2
OPTIONS = [
    f"schedule.total={STEPS} steps",
    "monitor.tensorboard=true",
    "model.num_layers=2",
    "batch.micro_size=2",
    "data.validation=null",
]
EVERY = ["monitor.norms_every=2 steps", "monitor.histograms_every=2 steps", "monitor.norms_by=weight"]


class Kept(Silent):
    """What was told, by step."""

    def __init__(self) -> None:
        self.told: dict[int, tuple[Norms, Histograms]] = {}
        self.total: dict[int, float] = {}
        self.measured: list[int] = count_measured()
        self.computed: list[int] = []  # measurements of the updates up to each step

    def norms(self, step: int, norms: Norms) -> None:
        self.norm = norms

    def histograms(self, step: int, histograms: Histograms) -> None:
        self.told[step] = (self.norm, histograms)

    def log(self, **fields: Any) -> None:
        self.total[fields["step"]] = fields["grad_norm"]
        self.computed.append(len(self.measured))


def trained(config: str, overrides: list[str]) -> tuple[Norms, Histograms, float]:
    """What the second of two steps told, and its global norm."""
    from pretrain.train import train

    run = start_run(config, [*OPTIONS, *EVERY, *overrides])
    run.reporter = kept = Kept()
    train(run)
    assert list(kept.told) == [STEPS]
    assert kept.computed[0] == 0 < kept.computed[1], "measured at another step"
    return *kept.told[STEPS], kept.total[STEPS]


def count_measured() -> list[int]:
    """Calls of the meters' work, from here on in this process."""
    calls: list[int] = []
    original = Meter._add

    def add(self: Meter, found: dict[str, Tensor], share: Any, values: Tensor) -> None:
        calls.append(values.numel())
        original(self, found, share, values)

    Meter._add = add  # type: ignore[method-assign]
    return calls


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[Norms, Histograms, float]:
    config = write_config(tmp_path_factory.mktemp("alone"), tiny_data)
    return run_ranks(1, trained, str(config), [])[0]  # type: ignore[no-any-return]


def assert_same(ours: Norms, theirs: Norms, total: float) -> None:
    for one, other, floor in ((ours.gradients, theirs.gradients, total * 1e-3), (ours.weights, theirs.weights, 0.0)):
        assert one.keys() == other.keys()
        for name, norm in one.items():
            assert abs(other[name] - norm) <= 1e-5 * max(norm, floor), name


def overrides_of(text: str) -> list[str]:
    layout = Layout.parse(text)
    axes = ("tensor", "sequence", "pipeline", "context", "zero", "offload")
    return [f"parallel.{axis}={str(getattr(layout, axis)).lower()}" for axis in axes]


def trained_under(config: str, texts: list[str]) -> list[tuple[Norms, Histograms, float]]:
    """The same under some layouts of as many ranks, one after the other."""
    return [trained(config, [f"run.dir={config}-{number}", *overrides_of(text)]) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    "texts",
    [["dp=2,zero=0", "dp=2,zero=1", "cp=2,zero=2", "dp=2,zero=2,offload", "dp=2,zero=3"], ["tp=2,sp,pp=2,zero=0"]],
    ids=["two ranks", "four ranks"],
)
def test_norms_and_histograms_are_one_processs_under_every_layout(
    texts: list[str], alone: tuple[Norms, Histograms, float], tmp_path: Path, tiny_data: Path
) -> None:
    world = Layout.parse(texts[0]).size
    norms, histograms, total = alone
    for found in run_ranks(world, trained_under, str(write_config(tmp_path, tiny_data)), texts, timeout=300):
        for theirs, theirs_histograms, _ in found:
            assert_same(norms, theirs, total)
            for ours, other in zip(histograms, theirs_histograms, strict=True):
                assert ours.keys() == other.keys()
                for name in ours:
                    assert_near(ours[name], other[name], name)


def assert_near(ours: Histogram, other: Histogram, name: str) -> None:
    """All numbers counted once; rounding moves hardly one over an edge."""
    assert sum(ours.counts) == sum(other.counts), name
    counts = [dict(zip(one.edges, one.counts, strict=False)) for one in (ours, other)]
    moved = sum(abs(counts[0].get(edge, 0) - counts[1].get(edge, 0)) for edge in counts[0].keys() | counts[1].keys())
    assert moved <= max(4, sum(ours.counts) / 100), name


def test_of_all_weights_they_are_the_global_norm_and_leave_no_element_out(
    alone: tuple[Norms, Histograms, float],
) -> None:
    norms, histograms, total = alone
    assert math.sqrt(sum(norm**2 for norm in norms.gradients.values())) == pytest.approx(total, rel=1e-5)
    for of in histograms:
        assert sum(sum(found.counts) for found in of.values()) == sum(
            sum(found.counts) for found in histograms.weights.values()
        )
    for kind, of in (("gradients", histograms.gradients), ("weights", histograms.weights)):
        for name, found in of.items():
            assert math.sqrt(found.square_sum) == pytest.approx(getattr(norms, kind)[name], rel=1e-5)


def by_hand(config: str, overrides: list[str]) -> tuple[Norms, Norms]:
    """Of one step: what the gauges say, and torch of autograd's gradients and the whole tensors."""
    run = start_run(config, [*OPTIONS, "monitor.norms_every=1 steps", "monitor.norms_by=weight", *overrides])
    data = next(run.data())
    run.forward_backward(data)
    gradients: dict[str, float] = {}
    for parameter, path in parameter_paths(run.built.stages).items():
        assert parameter.grad is not None
        for piece in parameter.pieces:  # type: ignore[attr-defined]
            *parents, _, leaf = path.split(".")
            name = ".".join([*parents, piece.name, leaf]) if piece.name else path
            gradients[name] = parameter.grad[piece.start : piece.start + piece.size[0]].double().norm().item()
    run.update()
    whole = whole_tensors(run.engine, run.grid)
    weights = {name: kinds["weight"].double().norm().item() for name, kinds in whole.items()}
    return run.showing.gauges.norms(), Norms(gradients, weights)


def test_norms_are_torchs_of_the_gradients_and_of_the_weights_after_the_step(tmp_path: Path, tiny_data: Path) -> None:
    [(ours, torchs)] = run_ranks(1, by_hand, str(write_config(tmp_path, tiny_data)), ["batch.micro_size=8"])
    assert_same(torchs, ours, 0.0)


def test_a_histogram_counts_as_torch_does_and_its_parts_add_up() -> None:
    values = torch.cat([torch.randn(5000, generator=torch.Generator().manual_seed(3)) * 1e-3, torch.tensor([0.0, 1e9])])
    found = histogram(spread(values[:700]) + spread(values[700:]))
    assert found == histogram(spread(values))
    assert sum(found.counts) == len(values) and found.edges[-1] == 2.0**10
    inside = values[:5000]
    for lower, upper, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        if upper < 1.0:
            zero = lower < 0.0 < upper
            assert ((inside > lower) & (inside <= upper)).sum() + zero == count
    assert found.square_sum == pytest.approx(values.double().square().sum().item(), rel=1e-6)


def test_numbers_that_are_not_finite_are_in_no_bucket_but_show_in_the_norm() -> None:
    values = torch.tensor([1.0, math.nan, math.inf])
    assert sum(histogram(spread(values)).counts) == 1
    assert not math.isfinite(squares(values).item())
    assert histogram(spread(torch.tensor([math.nan]))).counts == []


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.3.attention.q.weight", "blocks.3"),
        ("decoder.blocks.11.norm_1.weight", "decoder.blocks.11"),
        ("embedding.weight", "embedding"),
        ("pair_head.bias", "pair_head"),
        ("transform.dense.weight", "transform.dense"),
    ],
)
def test_a_weight_belongs_to_its_layer(name: str, layer: str) -> None:
    assert layer_of(name) == layer
