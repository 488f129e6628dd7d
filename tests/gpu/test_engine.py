"""A run at world size 1: the model against float64, training against the plain path, ZeRO's stages, a resume.

Several ranks stay on CPUs and gloo (tests/parallel, tests/test_matrix.py): one GPU proves nothing about NCCL between two.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backends import Backends, Wish
from parallel import grid as grids
from parallel.engine import AdamWOptions
from parallel.grid import Grid
from parallel.layers import Parts
from parallel.layout import Layout
from parallel.sharded import DeepSpeedEngine
from parallel.stages import Stage
from pretrain import build, runs
from pretrain.models.gpt import GPT
from pretrain.train import train
from tests.gpu.conftest import Place
from tests.training import Recorder, start_run

SMALL = (
    *("model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1", "model.initial_scale=0.1"),
    *("batch={size: 2, micro_size: 2}", "data.seq_length=16", "optimizer.epsilon=1.0e-5"),
    *("schedule={kind: constant, total: 4 steps}", "checkpoint.every=2 steps", "data.validation=null"),
)
PLAIN = ("kernels.attention=torch", "kernels.loss=torch", "kernels.optimizer=torch")


def ours(place: Place) -> tuple[str, ...]:
    """What `auto` chooses on a GPU; on a CPU it would be torch."""
    return tuple(wish.replace("torch", "triton" if place.rehearsed else "auto") for wish in PLAIN)


def trained(config: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """What each step logged."""
    run = start_run(str(config), [*SMALL, f"run.dir={folder}", *overrides])
    run.reporter = recorder = Recorder()
    run.resume()
    train(run)
    return recorder.logged


def numbers(logged: list[dict[str, Any]]) -> list[float]:
    return [step[name] for step in logged for name in ("loss", "grad_norm")]


def model_gradients(
    config: Path, device: torch.device, dtype: torch.dtype, wish: Wish
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of two sequences and the gradient of every weight, in float64 on the CPU."""
    settings, length = runs.open_config(str(config), list(SMALL), 1), 16
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(500, (2, length + 1), generator=generator)
    batch = (ids[:, :-1], ids[:, 1:], torch.ones(2, length), torch.tensor([5, 9], dtype=torch.int32))
    model = GPT(settings.model, Parts(backends=Backends(wish, device, dtype)), 512, length)
    for p in model.parameters():
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    model.to(device, dtype)
    loss = model(*(x.to(device) for x in batch)) / batch[2].sum()
    loss.backward()
    gradients = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach().cpu().double(), gradients


def test_a_model_in_low_precision_is_near_to_float64(place: Place, config: Path) -> None:
    """As near as a few roundings of its type leave it: 2^-8 each in bfloat16."""
    exact, wanted = model_gradients(config, torch.device("cpu"), torch.float64, "torch")
    loss, gradients = model_gradients(config, place.device, place.dtypes[0], "triton" if place.rehearsed else "auto")
    assert abs(loss - exact) < 0.01 * exact
    assert gradients.keys() == wanted.keys()
    for name, want in wanted.items():
        assert (gradients[name] - want).norm() < 0.05 * want.norm(), name


def test_training_is_that_of_the_plain_path(place: Place, config: Path, tmp_path: Path) -> None:
    """In fp32, with dropout: the same to 1e-5."""
    found = trained(config, tmp_path / "ours", *ours(place))
    wanted = trained(config, tmp_path / "plain", *PLAIN)
    assert len(found) == 4 and numbers(found) == pytest.approx(numbers(wanted), rel=1e-5)


def test_a_resume_is_exact(place: Place, config: Path, tmp_path: Path) -> None:
    whole = trained(config, tmp_path / "whole", *ours(place))
    first = trained(config, tmp_path / "parts", *ours(place), "schedule.total=2 steps")
    second = trained(config, tmp_path / "parts", *ours(place))
    assert [step["step"] for step in second] == [3, 4]
    assert numbers(first + second) == numbers(whole)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_stages_step_with_the_kernels(
    place: Place, config: Path, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process needs no ZeRO and is given none; here it is, so that DeepSpeed's code meets this device."""

    def sharded(stages: list[Stage], grid: Grid, options: AdamWOptions, tied: None) -> DeepSpeedEngine:
        layout = Layout(zero=stage)
        return DeepSpeedEngine(
            stages, grids._parallel_grid(layout, 0, 1, grid.device, timedelta(seconds=60)), options, tied
        )

    wanted = trained(config, tmp_path / "plain", *PLAIN)
    monkeypatch.setattr(build, "make_engine", sharded)
    found = trained(config, tmp_path / "zero", *ours(place))
    assert len(found) == 4 and numbers(found) == pytest.approx(numbers(wanted), rel=1e-5)


def test_the_ranks_meet_over_nccl_on_a_gpu(place: Place, config: Path) -> None:
    assert grids.start_grid(Layout(), 60).device.type == place.device.type
    assert torch.distributed.get_backend() == ("gloo" if place.rehearsed else "nccl")
