"""The real command trained by each backend of the kernels: the same losses, and every Triton kernel proved to have run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pretrain.metrics import read_metrics
from tests.distributed import run_ranks
from tests.pretrain.running import Ran, command, run_main

STEPS = 50
CONFIG = """
version: 1
model: {kind: gpt, num_layers: 1, hidden_size: 16, num_heads: 2, num_kv_heads: 1, ffn_hidden_size: 32, positions: rope,
        norm: rms, activation: swiglu, initial_scale: 0.1, attention_dropout: ATTENTION_DROPOUT,
        residual_dropout: ATTENTION_DROPOUT}
data: {train: SHARDS/train, seq_length: 16}
objective: {kind: causal, attention_across_documents: DOCUMENTS}
batch: {size: 1, micro_size: 1}
optimizer: {epsilon: 1.0e-5, learning_rate: 3.0e-3}
schedule: {total: 50 steps}
precision: {compute: fp32, compile: never}
checkpoint: {every: 50 steps}
monitor: {log_every: 1 steps, tensorboard: false}
"""
ATTENTION = {"forward_kernel", "delta_kernel", "key_kernel", "query_kernel"}
OPTIMIZER = {"adamw_kernel", "square_kernel"}
LOSS = {"statistics_kernel", "slope_kernel"}
NORM = {"norm_kernel", "norm_backward_kernel"}
ACTIVATION = {"activation_kernel", "activation_backward_kernel"}
ROWS = {*NORM, *ACTIVATION, "rotary_kernel"}
PARTS = ("attention", "loss", "norm", "rotary", "activation", "optimizer")
TORCH = tuple(f"kernels.{part}=torch" for part in PARTS)
TRITON = tuple(f"kernels.{part}=triton" for part in PARTS)
LONG = tuple(
    wish.replace("triton", "torch") if part in PARTS[2:5] else wish for part, wish in zip(PARTS, TRITON, strict=True)
)
SHORT = ("schedule={total: 3 steps}", "batch.size=2")  # for two ranks


class Trained(NamedTuple):
    """One run's losses and norms by step, and what each rank launched: how often each kernel."""

    losses: list[float]
    norms: list[float]
    launches: list[Counter[str]]


def write(folder: Path, shards: Path, dropout: float, across: bool) -> Path:
    folder.mkdir(exist_ok=True)
    text = CONFIG.replace("SHARDS", str(shards)).replace("ATTENTION_DROPOUT", str(dropout))
    (folder / "config.yaml").write_text(text.replace("DOCUMENTS", str(across).lower()))
    return folder / "config.yaml"


def train(config: Path, folder: Path, *overrides: str, world: int = 1) -> Trained:
    """In ranks whose kernels are interpreted."""
    arguments = ["train", str(config), f"run.dir={folder}", *overrides]
    ranks = run_ranks(world, counted, arguments, timeout=300, interpreted=True)
    ran: Ran = ranks[0][0]
    assert ran.code == 0, ran.told
    kernels = [text.removeprefix("kernels.").replace("=", " ") for text in overrides if text.startswith("kernels.")]
    assert f"kernels: {', '.join(kernels)}" in ran.out
    lines = [line for line in read_metrics(folder) if "loss" in line]
    losses, norms = ([line[name] for line in lines] for name in ("loss", "grad_norm"))
    return Trained(losses, norms, [launches for _, launches in ranks])


def counted(arguments: list[str]) -> tuple[Ran, Counter[str]]:
    """The command in this rank, and its launches by the kernel's name."""
    from triton.runtime.interpreter import InterpretedFunction

    launches: Counter[str] = Counter()
    run = InterpretedFunction.run

    def count(self: Any, *args: Any, **options: Any) -> Any:
        launches[self.fn.__name__] += 1
        return run(self, *args, **options)

    InterpretedFunction.run = count
    return run_main(arguments), launches


def same(found: list[float], wanted: list[float], tolerance: float) -> None:
    assert len(found) == len(wanted) == STEPS and all(map(math.isfinite, found))
    assert found == pytest.approx(wanted, rel=tolerance)


@pytest.mark.thorough
def test_fifty_steps_by_triton_are_those_by_torch(tmp_path: Path, tiny_data: Path) -> None:
    """With dropout and documents kept apart. Each kernel ran in every step, and not once where torch was asked for."""
    config = write(tmp_path, tiny_data, 0.1, across=False)
    plain = train(config, tmp_path / "torch", *TORCH)
    ours = train(config, tmp_path / "triton", *LONG)  # norms, rotary and activations are in the three steps below
    same(ours.losses, plain.losses, 1e-5)
    same(ours.norms, plain.norms, 1e-5)
    assert plain.losses[-1] < plain.losses[0] - 0.1
    assert plain.launches == [{}]
    (launches,) = ours.launches
    assert set(launches) == ATTENTION | OPTIMIZER | LOSS
    # One layer; and the self-test before the first step.
    assert all(launches[name] == STEPS + 1 for name in ATTENTION)
    assert all(launches[name] == STEPS for name in OPTIMIZER)


@pytest.mark.thorough
def test_fifty_steps_by_flash_attention_are_those_by_torch(tmp_path: Path, tiny_data: Path) -> None:
    config = write(tmp_path, tiny_data, 0.0, across=True)
    plain = train(config, tmp_path / "torch", *TORCH)
    flash = train(config, tmp_path / "flash", "kernels.attention=flash", *TORCH[1:])
    same(flash.losses, plain.losses, 1e-5)
    same(flash.norms, plain.norms, 1e-5)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[Path, list[float]]:
    """The config, and its losses by torch in one process."""
    folder = tmp_path_factory.mktemp("zero")
    config = write(folder, tiny_data, 0.1, across=False)
    ran = command("train", config, f"run.dir={folder}/one", *SHORT)
    assert ran.code == 0, ran.told
    return config, [line["loss"] for line in read_metrics(folder / "one")]


@pytest.mark.thorough
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_kernels_run_inside_zero(tmp_path: Path, three_steps: tuple[Path, list[float]], stage: int) -> None:
    """On both ranks; the norm is DeepSpeed's own."""
    config, losses = three_steps
    found = train(config, tmp_path / "run", *SHORT, f"parallel.zero={stage}", *TRITON, world=2)
    assert found.losses == pytest.approx(losses, rel=1e-5)
    for launches in found.launches:
        assert set(launches) == ATTENTION | LOSS | ROWS | {"adamw_kernel"}
        assert all(launches[name] == 3 for name in ACTIVATION)  # one layer, one sequence of a rank a step
        assert all(launches[name] == 9 for name in NORM)  # two in the layer, and the last
        assert launches["rotary_kernel"] == 6  # forward and backward
