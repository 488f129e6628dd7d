"""The real command trained by each backend of the kernels: the same losses, and every Triton kernel proved to have run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from parallel.ports import free_port
from pretrain.metrics import read_metrics
from tests.distributed import run_python, start_python

STEPS = 50
CONFIG = """
version: 1
model: {kind: gpt, num_layers: 1, hidden_size: 16, num_heads: 2, num_kv_heads: 1, ffn_hidden_size: 32, positions: rope,
        norm: rms, activation: swiglu, initial_scale: 0.1, attention_dropout: ATTENTION_DROPOUT}
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
TORCH = ("kernels.attention=torch", "kernels.loss=torch", "kernels.optimizer=torch")
TRITON = ("kernels.attention=triton", "kernels.loss=triton", "kernels.optimizer=triton")
SHORT = ("schedule={total: 3 steps}", "batch.size=2")  # for two ranks


class Trained:
    """One run's losses and norms by step, and what it launched."""

    def __init__(self, folder: Path, counts: Path) -> None:
        lines = [line for line in read_metrics(folder) if "loss" in line]
        self.losses = [line["loss"] for line in lines]
        self.norms = [line["grad_norm"] for line in lines]
        self.launches = json.loads(counts.read_text())


def write(folder: Path, shards: Path, dropout: float, across: bool) -> Path:
    folder.mkdir(exist_ok=True)
    text = CONFIG.replace("SHARDS", str(shards)).replace("ATTENTION_DROPOUT", str(dropout))
    (folder / "config.yaml").write_text(text.replace("DOCUMENTS", str(across).lower()))
    return folder / "config.yaml"


def train(config: Path, name: str, *kernels: str) -> Trained:
    """In one process, its kernels interpreted."""
    run, counts = config.parent / name, config.parent / f"{name}.json"
    result = run_python(
        ["tests.pretrain.counted", counts, "train", config, f"run.dir={run}", *kernels],
        env={"TRITON_INTERPRET": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    told = ", ".join(f"{kernel.removeprefix('kernels.').replace('=', ' ')}" for kernel in kernels)
    assert f"kernels: {told}" in result.stdout
    return Trained(run, counts)


def same(found: list[float], wanted: list[float], tolerance: float) -> None:
    assert len(found) == len(wanted) == STEPS and all(map(math.isfinite, found))
    assert found == pytest.approx(wanted, rel=tolerance)


def test_fifty_steps_by_triton_are_those_by_torch(tmp_path: Path, tiny_data: Path) -> None:
    """With dropout and documents kept apart. Each kernel ran in every step, and not once where torch was asked for."""
    config = write(tmp_path, tiny_data, 0.1, across=False)
    plain = train(config, "torch", *TORCH)
    ours = train(config, "triton", *TRITON)
    same(ours.losses, plain.losses, 1e-5)
    same(ours.norms, plain.norms, 1e-5)
    assert plain.losses[-1] < plain.losses[0] - 0.1
    assert plain.launches == {}
    assert set(ours.launches) == ATTENTION | OPTIMIZER | LOSS
    # One layer; and the self-test before the first step.
    assert all(ours.launches[name] == STEPS + 1 for name in ATTENTION)
    assert all(ours.launches[name] == STEPS for name in OPTIMIZER)


def test_fifty_steps_by_flash_attention_are_those_by_torch(tmp_path: Path, tiny_data: Path) -> None:
    config = write(tmp_path, tiny_data, 0.0, across=True)
    plain, flash = train(config, "torch", *TORCH), train(config, "flash", "kernels.attention=flash", *TORCH[1:])
    same(flash.losses, plain.losses, 1e-5)
    same(flash.norms, plain.norms, 1e-5)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[Path, list[float]]:
    """The config, and its losses by torch in one process."""
    folder = tmp_path_factory.mktemp("zero")
    config = write(folder, tiny_data, 0.1, across=False)
    result = run_python(["pretrain", "train", config, f"run.dir={folder}/one", *SHORT])
    assert result.returncode == 0, result.stderr
    return config, [line["loss"] for line in read_metrics(folder / "one")]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_kernels_run_inside_zero(tmp_path: Path, three_steps: tuple[Path, list[float]], stage: int) -> None:
    """On both ranks; the norm is DeepSpeed's own."""
    config, losses = three_steps
    overrides = [f"run.dir={tmp_path}/run", *SHORT, f"parallel.zero={stage}", *TRITON]
    ranks = {"TRITON_INTERPRET": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    processes = [
        start_python(
            ["tests.pretrain.counted", tmp_path / f"{rank}.json", "train", config, *overrides],
            env={**ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
    for rank in range(2):
        found = Trained(tmp_path / "run", tmp_path / f"{rank}.json")
        assert found.losses == pytest.approx(losses, rel=1e-5)
        assert set(found.launches) == ATTENTION | LOSS | {"adamw_kernel"}
