"""What an engine keeps, as boxes of logical tensors: each element once under every layout, and nothing lost on the way
from one layout to another. Sizes are odd, so that DeepSpeed cuts inside rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.boxes import KINDS, Box, held_boxes, whole_tensors
from parallel.engine import MOMENTS, Engine, Share
from parallel.grid import start_grid
from parallel.initial import initialise
from parallel.layers import Parts
from parallel.layout import Layout
from parallel.logical import Initial, Piece, canonical, describe, view
from parallel.stages import parameter_paths
from pretrain import checkpoint
from pretrain.build import build
from pretrain.checkpoint import State
from pretrain.config.run import Config
from pretrain.models.gpt import GPT
from pretrain.saving import Order, Saver
from pretrain.sizes import Sizes
from tests.distributed import run_ranks

VOCABULARY, SEED = 131, 5
MODEL = {
    "num_layers": 4,
    "hidden_size": 9,
    "num_heads": 2,
    "head_size": 3,
    "ffn_hidden_size": 10,
    "positions": "learned",
    "activation": "swiglu",
}


def make_config(parallel: dict[str, Any], compute: str, freeze: Sequence[str] = ()) -> Config:
    return Config.model_validate(
        {
            "model": MODEL,
            "data": {"seq_length": 7},
            "parallel": parallel,
            "optimizer": {"freeze": list(freeze)},
            "precision": {"compute": compute, "compile": "never"},
            "run": {"seed": SEED},
        }
    )


def truth(name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
    """A whole logical tensor, full of numbers that are nowhere else."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}/{name}".encode()))
    return torch.randn(*shape, generator=generator)


def local_truth(path: str, parameter: nn.Parameter, kind: str) -> Tensor:
    values = torch.zeros(parameter.shape)
    for piece in parameter.pieces:  # type: ignore[attr-defined]
        whole = truth(canonical(path, piece), kind, piece.shape)
        box = tuple(slice(first, first + n) for first, n in zip(piece.offset, piece.size, strict=True))
        view(values, piece).copy_(whole[box])
    return values


class Stop(NamedTuple):
    """What one rank holds on its way."""

    initial: list[Box]
    loaded: list[Box]
    updates: int


def wander(layout: Layout, compute: str, source: Path | None, target: Path, freeze: Sequence[str] = ()) -> Stop:
    """Build under a layout; load what another wrote (or make it up); write it again."""
    grid = start_grid(layout, 60)
    parallel = {axis: getattr(layout, axis) for axis in ("tensor", "sequence", "pipeline", "virtual", "zero")}
    built = build(make_config(parallel, compute, freeze), grid, Sizes(VOCABULARY))
    initial = held_boxes(built.engine, grid)
    if source is None:
        write_truth(built.engine)
    else:
        found = checkpoint.latest(source, grid=grid)
        assert found is not None
        checkpoint.load_engine(found, built.engine, grid)
    for parameter, path in parameter_paths(built.stages).items() if layout.zero < 3 else ():
        expected = local_truth(path, parameter, "weight").to(parameter.dtype)
        assert torch.equal(parameter.data, expected), f"{path} computes with other weights than were loaded"
    saver = Saver(target, grid)
    saver.save(Order(State(step=3, samples=24, updates=2), {}, 1, lambda step: False, lambda: None), built.engine)
    saver.wait()
    return Stop(initial, held_boxes(built.engine, grid), built.engine.updates)


@torch.no_grad()
def write_truth(engine: Engine) -> None:
    engine.updates = 2
    for share in engine.shares():
        part = slice(share.start, share.start + share.numel)
        for kind, flat in {"weight": share.master, **share.moments}.items():
            flat.copy_(local_truth(share.path, share.parameter, kind).flatten()[part])
    engine.publish()


def assembled(parts: list[list[Box]]) -> dict[tuple[str, str], Tensor]:
    """Logical tensors of all ranks' boxes; an element that no box or more than one has is an error."""
    tensors: dict[tuple[str, str], Tensor] = {}
    times: dict[tuple[str, str], Tensor] = {}
    for box in (box for boxes in parts for box in boxes):
        key = (box.name, box.kind)
        place = tuple(slice(first, first + n) for first, n in zip(box.offset, box.values.shape, strict=True))
        tensors.setdefault(key, torch.zeros(box.shape))[place] = box.values
        times.setdefault(key, torch.zeros(box.shape))[place] += 1
    for key, count in times.items():
        assert (count == 1).all(), f"{key}: elements kept {count.min():.0f} to {count.max():.0f} times"
    return tensors


@pytest.fixture(scope="module")
def initial() -> dict[str, Tensor]:
    """The logical tensors of the whole model at its beginning, and so the names and shapes of all."""
    config = make_config({}, "fp32")
    model = GPT(config.model, Parts(), VOCABULARY, config.data.seq_length)
    initialise(model, SEED)
    rows = ((path, p, piece) for path, p in model.named_parameters() for piece in p.pieces)  # type: ignore[attr-defined]
    return {canonical(path, piece): view(p.data, piece).clone() for path, p, piece in rows}


WAY = [
    ("", "fp32"),
    ("tp=2,dp=2,zero=1", "fp32"),
    ("dp=3,zero=1", "bf16"),
    ("pp=2,vp=2,dp=2,zero=1", "fp32"),
    ("dp=2", "bf16"),
    ("dp=3,zero=1", "fp32"),
    ("tp=2,pp=2", "fp32"),
    ("zero=1", "fp32"),
]


def test_weights_and_moments_go_from_layout_to_layout_bitwise(initial: dict[str, Tensor], tmp_path: Path) -> None:
    source: Path | None = None
    for number, (text, compute) in enumerate(WAY):
        layout, target = Layout.parse(text), tmp_path / str(number)
        stops = run_ranks(layout.size, wander, layout, compute, source, target)
        begun = assembled([stop.initial for stop in stops])
        loaded = assembled([stop.loaded for stop in stops])
        assert set(begun) == set(loaded) == {(name, kind) for name in initial for kind in KINDS}, text
        for name, kind in begun:
            weights = initial[name] if kind == "weight" else torch.zeros_like(initial[name])
            assert torch.equal(begun[name, kind], weights), f"{text}: {name} begins otherwise than in one process"
            assert torch.equal(loaded[name, kind], truth(name, kind, initial[name].shape)), f"{text}: {kind} of {name}"
        assert {stop.updates for stop in stops} == {2}
        source = target


FROZEN_WAY = ["tp=2", "dp=3,zero=3", "dp=2,zero=2"]
FROZEN = ("embedding", "blocks.0.attention", "blocks.1", "blocks.2.feed_forward.down", "*.norm_1.bias")


def test_weights_that_do_not_learn_go_with_the_others_without_moments(
    initial: dict[str, Tensor], tmp_path: Path
) -> None:
    source: Path | None = None
    for number, text in enumerate(FROZEN_WAY):
        layout, target = Layout.parse(text), tmp_path / str(number)
        stops = run_ranks(layout.size, wander, layout, "fp32", source, target, FROZEN)
        loaded = assembled([stop.loaded for stop in stops])
        assert {name for name, kind in loaded if kind == "weight"} == initial.keys()
        still = initial.keys() - {name for name, kind in loaded if kind == "exp_avg"}
        assert {"embedding.weight", "blocks.0.attention.k.weight", "blocks.3.norm_1.bias"} < still and len(still) == 32
        for name, kind in loaded:
            assert torch.equal(loaded[name, kind], truth(name, kind, initial[name].shape)), f"{text}: {kind} of {name}"
        source = target


# -- rows cut anywhere ---------------------------------------------------------------------------------------------


class Cut:
    """An engine whose flat shares are cut at given places, as ZeRO might."""

    replicated = False

    def __init__(self, shares: list[Share]) -> None:
        self._shares = shares

    def shares(self) -> Iterator[Share]:
        return iter(self._shares)


SHAPES = {"matrix.weight": (5, 7), "matrix.bias": (6,), "wide.weight": (2, 31), "narrow.weight": (9, 1)}


def make_parameters() -> dict[str, nn.Parameter]:
    """One holds two logical tensors and two rows of padding."""
    parameters = {}
    for path, shape in SHAPES.items():
        pieces: tuple[Piece, ...] | None = None
        if path == "matrix.weight":
            pieces = Piece("q", (2, 7), (0, 0), (2, 7), 0), Piece("k", (1, 7), (0, 0), (1, 7), 2)
        parameters[path] = describe(nn.Parameter(torch.zeros(shape)), Initial("zeros"), pieces)
    return parameters


def shares_between(parameters: dict[str, nn.Parameter], begin: int, end: int) -> list[Share]:
    """What elements begin : end of all parameters in a row are of each."""
    shares, first = [], 0
    for path, parameter in parameters.items():
        start, stop = max(begin, first) - first, min(end, first + parameter.numel()) - first
        first += parameter.numel()
        if start < stop:
            flat = {kind: local_truth(path, parameter, kind).flatten()[start:stop] for kind in KINDS}
            shares.append(
                Share(path, parameter, start, stop - start, flat["weight"], {name: flat[name] for name in MOMENTS})
            )
    return shares


def cut_anywhere(trials: int) -> list[tuple[list[int], list[Box], dict[str, dict[str, Tensor]]]]:
    """Boxes of this rank, and the whole tensors (on rank 0), for many ways to cut."""
    grid = start_grid(Layout(data=4, zero=1), 60)
    parameters, random, results = make_parameters(), Random(3), []
    total = sum(parameter.numel() for parameter in parameters.values())
    for trial in range(trials):
        places = sorted(random.randint(0, total) for _ in range(3))
        if trial % 3 == 0:  # three within one long row
            places = sorted(random.randint(41, 103) for _ in range(3))
        cuts = [0, *places, total]
        engine: Any = Cut(shares_between(parameters, *cuts[dist.get_rank() : dist.get_rank() + 2]))
        results.append((cuts, held_boxes(engine, grid), whole_tensors(engine, grid)))
    return results


def test_rows_cut_anywhere_are_written_whole_and_once() -> None:
    ranks = run_ranks(4, cut_anywhere, 60)
    for results in zip(*ranks, strict=True):
        cuts, _, whole = results[0]
        found = assembled([boxes for _, boxes, _ in results])
        names = {"matrix.bias", "wide.weight", "narrow.weight", "q.weight", "k.weight"}
        assert set(found) == {(name, kind) for name in names for kind in KINDS}, cuts
        for (name, kind), tensor in found.items():
            assert torch.equal(tensor, truth(name, kind, tuple(tensor.shape))), (cuts, name, kind)
            assert torch.equal(whole[name][kind], tensor)
