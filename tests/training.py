"""Training runs for tests: the real `Run`, with what it would report collected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from parallel.grid import start_grid
from parallel.layout import Layout, rank_and_world
from pretrain import runs
from pretrain.data.sources import Sources
from pretrain.interrupt import Interrupt
from pretrain.report import Silent
from pretrain.train import Run, train

TINY = """
version: 1
model: {kind: gpt, num_layers: 4, hidden_size: 32, num_heads: 4, num_kv_heads: 4, ffn_hidden_size: 64, positions: rope,
        norm: rms, activation: swiglu, tie_embeddings: true, dropout: 0.1}
data: {train: SHARDS/train, validation: SHARDS/validation, seq_length: 32}
objective: {kind: causal, loss_across_documents: false}
batch: {size: 8, micro_size: 1}
optimizer: {kind: adamw, learning_rate: 1.0e-2, betas: [0.9, 0.95], weight_decay: 0.1, clip_norm: 1.0}
schedule: {kind: cosine, warmup: 2 steps, total: 10 steps, final_fraction: 0.1}
parallel: {zero: 0}
precision: {compute: fp32, compile: never}
checkpoint: {every: 100 steps, keep_last: 2}
monitor: {log_every: 1 steps, tensorboard: false}
run: {dir: RUN, seed: 1}
"""


class Recorder(Silent):
    """Keeps every logged step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, **fields: Any) -> None:
        self.logged.append(fields)


def write_config(folder: Path, shards: Path, **replace: str) -> Path:
    """The tiny config in a file; `replace` exchanges text in it."""
    text = TINY.replace("SHARDS", str(shards)).replace("RUN", str(folder / "run"))
    for old, new in replace.items():
        text = text.replace(old, new)
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def run_training(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Train in this rank's place: what was logged, and which libraries' engines were called."""
    torch.set_num_threads(1)
    world = rank_and_world()[1]
    config = runs.open_config(config_path, overrides, world)
    calls = count_calls()
    sources = Sources.open(config)
    grid = start_grid(Layout.of(config.parallel, world), 60)
    run = Run(config, grid, sources, Interrupt())
    runs.claim_folder(config, grid, sources)
    run.reporter = recorder = Recorder()
    run.resume()
    train(run)
    return {"logged": recorder.logged, "calls": dict(calls)}


def count_calls() -> dict[str, int]:
    """Counters on megatron-core's pipeline schedules and DeepSpeed's step, for this process."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from megatron.core.pipeline_parallel import schedules

    calls: dict[str, int] = {}

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **options)

        setattr(owner, name, call)

    counted(schedules, "forward_backward_pipelining_without_interleaving")
    counted(schedules, "forward_backward_pipelining_with_interleaving")
    counted(DeepSpeedEngine, "step")
    return calls
