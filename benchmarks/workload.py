"""The run that the layouts are measured with: the real one, with its stream of hashed shards, step by step.

Nothing is reported, validated or saved between the steps; everything else is `pretrain train`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parallel.grid import start_grid
from parallel.layout import Layout, rank_and_world
from pretrain.data.sources import Sources
from pretrain.interrupt import Interrupt
from pretrain.runs import open_config
from pretrain.train import Run

# configs/gpt/demo.yaml's model, in micro-batches that four processes can still share out
MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_heads": 4,
    "positions": "rope",
    "norm": "rms",
    "activation": "swiglu",
}
SEQUENCES, MICRO, TOKENS = 8, 2, 256


def write_config(folder: Path, shards: Path, name: str = "config", **sections: dict[str, Any]) -> Path:
    """A config of the standard workload; `sections` change fields of its sections."""
    config: dict[str, Any] = {
        "version": 1,
        "model": {**MODEL, "biases": False},
        "data": {"train": str(shards / "train"), "seq_length": TOKENS},
        "batch": {"size": SEQUENCES, "micro_size": MICRO},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": 1.0},
        "schedule": {"kind": "constant", "total": "1000000 steps"},
        "precision": {"compute": "fp32", "compile": "never"},
        "monitor": {"tensorboard": False},
        "run": {"dir": str(folder / "run")},
    }
    for section, fields in sections.items():
        config[section] = {**config.get(section, {}), **fields}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def layout_overrides(text: str) -> list[str]:
    """`tp=2,sp,zero=1` as overrides of a config."""
    layout = Layout.parse(text)
    values = {
        "tensor": layout.tensor,
        "sequence": layout.sequence,
        "context": layout.context,
        "pipeline": layout.pipeline,
        "virtual": layout.virtual,
        "zero": layout.zero,
        "offload": layout.offload,
    }
    return [f"parallel.{name}={json.dumps(value)}" for name, value in values.items()]


def start_run(path: str, overrides: Sequence[str]) -> Run:
    """The run at this rank's place."""
    os.environ.setdefault("LOCAL_RANK", "0")
    world = rank_and_world()[1]
    config = open_config(path, list(overrides), world)
    grid = start_grid(Layout.of(config.parallel, world), 120)
    return Run(config, grid, Sources.open(config), Interrupt())


def steps(run: Run) -> Iterator[float]:
    """Train for ever, as `pretrain.train.train` does; the seconds of each step."""
    started = time.perf_counter()
    for data in run.data():
        loss = run.forward_backward(data)
        update = run.update()
        run.advance(data, update)
        run.log(data, loss, update)
        now = time.perf_counter()
        yield now - started
        started = time.perf_counter()
