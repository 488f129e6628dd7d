"""Checkpoints of every format that a version of this program has written can be loaded, under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from parallel.boxes import KINDS, whole_tensors
from parallel.grid import start_grid
from parallel.initial import initialise
from parallel.layers import Parts
from parallel.layout import Layout
from parallel.logical import canonical
from pretrain import checkpoint
from pretrain.build import build
from pretrain.config.run import Config
from pretrain.models.gpt import GPT
from pretrain.opening import FORMAT
from pretrain.sizes import Sizes
from pretrain.storage import tensor_name
from tests.distributed import run_ranks
from tests.pretrain.formats import STATE, WRITERS, Tensors

VOCABULARY = 131
SIZES = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 10, "positions": "learned"}


class Loaded(NamedTuple):
    tensors: dict[str, dict[str, torch.Tensor]]
    updates: int
    state: checkpoint.State


def make_config(layout: Layout) -> Config:
    parallel = {axis: getattr(layout, axis) for axis in ("tensor", "sequence", "pipeline", "zero")}
    sections = {"model": SIZES, "data": {"seq_length": 8}, "parallel": parallel}
    return Config.model_validate({**sections, "precision": {"compute": "fp32", "compile": "never"}})


def tensors_of_model() -> Tensors:
    """Every logical tensor of the model in each kind, with numbers that are nowhere else."""
    config = make_config(Layout())
    model = GPT(config.model, Parts(), VOCABULARY, config.data.seq_length)
    initialise(model, 1)
    tensors: Tensors = {}
    count = 0
    for path, parameter in model.named_parameters():
        for piece in parameter.pieces:  # type: ignore[attr-defined]
            for kind in KINDS:
                numel = torch.Size(piece.shape).numel()
                values = [(count + place) / 8 for place in range(numel)]
                tensors[tensor_name(canonical(path, piece), kind)] = (piece.shape, values)
                count += numel
    return tensors


def load(run: Path, layout: Layout) -> Loaded:
    grid = start_grid(layout, 60)
    built = build(make_config(layout), grid, Sizes(VOCABULARY))
    found = checkpoint.latest(run, grid=grid)
    assert found is not None
    checkpoint.load_engine(found, built.engine, grid)
    return Loaded(whole_tensors(built.engine, grid), built.engine.updates, found.state)


def test_there_is_a_writer_of_each_format() -> None:
    assert sorted(WRITERS) == list(range(1, FORMAT + 1))


@pytest.mark.parametrize("layout", ["zero=0", "tp=2,zero=1", "dp=2,zero=1", "pp=2", "dp=2,zero=3"])
@pytest.mark.parametrize("number", sorted(WRITERS))
def test_a_checkpoint_of_each_format_is_loaded_number_by_number(tmp_path: Path, number: int, layout: str) -> None:
    tensors = tensors_of_model()
    WRITERS[number](tmp_path / "checkpoints" / "step-00000003", tensors)
    parsed = Layout.parse(layout)
    loaded = run_ranks(parsed.size, load, tmp_path, parsed)[0]
    found = {
        tensor_name(name, kind): value.flatten().tolist()
        for name, kinds in loaded.tensors.items()
        for kind, value in kinds.items()
    }
    assert found == {name: values for name, (_, values) in tensors.items()}
    assert loaded.updates == STATE["updates"]
    assert all(getattr(loaded.state, name) == value for name, value in STATE.items())
