"""Schedules of a tortured run, drawn from a seed: its lives, each with its layout and the death that ends it."""

from __future__ import annotations

import itertools
import random
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from parallel.layout import layout_problems
from pretrain import verify
from pretrain.config.load import load_config, shapes_of
from pretrain.config.run import Config
from tests import matrix
from tests.pretrain.kills import FILES, Death, Spot

STEPS = 24
EPOCH = 6 * 4 + 18 * 8  # samples of these steps: the batch grows after six
WORLDS = (1, 1, 1, 1, 2, 2, 2, 2, 4)  # processes, to be drawn from
CONFIG = """
version: 1
model: {kind: gpt, num_layers: 4, hidden_size: 32, num_heads: 4, num_kv_heads: 2, positions: rope, norm: rms,
        activation: swiglu, tie_embeddings: true, dropout: 0.1, initial_scale: 0.1}
data: {train: train, validation: shards/validation, seq_length: 32}
objective: {kind: causal, loss_across_documents: false}
batch: {size: 8, micro_size: 2, ramp: {start: 4, increment: 4, length: 6 steps}}
optimizer: {kind: adamw, learning_rate: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip_norm: 1.0, epsilon: 1.0e-5}
schedule: {kind: cosine, warmup: 2 steps, total: 24 steps, final_fraction: 0.1}
parallel: {zero: 0}
precision: {compute: fp32, compile: never}
monitor: {log_every: 1 steps, validate_every: 4 steps, validation_samples: 8, tensorboard: false}
run: {dir: run, seed: 1}
"""


class Life(NamedTuple):
    layout: str  # as `verify` reads it
    death: Death | None  # None: to the end of the epoch

    def __str__(self) -> str:
        return f"{self.layout}: {self.death or 'to the end of the epoch'}"


class Schedule(NamedTuple):
    seed: int
    every: int  # steps between checkpoints
    keep_last: int
    lives: tuple[Life, ...]

    def __str__(self) -> str:
        lives = "\n".join(f"  {number}. {life}" for number, life in enumerate(self.lives, start=1))
        return f"seed {self.seed}: a checkpoint every {self.every} steps, the last {self.keep_last} are kept\n{lives}"

    @property
    def kinds(self) -> list[str]:
        return [life.death.kind for life in self.lives if life.death is not None]

    @property
    def layouts(self) -> list[str]:
        return [life.layout for life in self.lives]


def draw(seed: int) -> Schedule:
    """Of any five seeds in a row each kind of death is in one, and one keeps its layout."""
    drawn = random.Random(seed)
    every, keep_last = drawn.choice([2, 3]), drawn.choice([1, 2])
    kinds = _kinds(seed, drawn)
    chosen = [drawn.choice(layouts(drawn.choice(WORLDS))) for _ in range(len(kinds) + 1)]
    if seed % 5 == 3:
        chosen = [drawn.choice(layouts(drawn.choice([1, 2])))] * len(chosen)
    lives = [Life(layout, kind.make(drawn, processes(layout))) for layout, kind in zip(chosen, kinds, strict=False)]
    return Schedule(seed, every, keep_last, (*lives, Life(chosen[-1], None)))


# -- layouts -----------------------------------------------------------------------------------------------------------


@cache
def layouts(world: int) -> list[str]:
    """Every layout of so many processes, with micro-batch and recomputation, that the config accepts."""
    axes = [matrix.AXES[name] for name in ("tensor", "context", "pipeline", "data", "zero", "recompute")]
    axes.append(("micro=1", "micro=2", "micro=4"))
    texts = (",".join(filter(None, values)) for values in itertools.product(*axes))
    return [text for text in texts if processes(text) == world and _accepted(text)]


def case_of(text: str) -> verify.Case:
    return verify.case_of(_config(), text)


@cache
def processes(text: str) -> int:
    return case_of(text).processes


def _accepted(text: str) -> bool:
    case = case_of(text)
    return not layout_problems(case.config.parallel, shapes_of(case.config), case.processes)


@cache
def _config() -> Config:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(CONFIG)
        file.flush()
        return load_config(Path(file.name))


# -- deaths ------------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    make: Callable[[random.Random, int], Death]  # from the number of processes
    steps: int  # by which the run gets on at most
    lives: int = 1  # that end so, one after the other


def _in_a_step(phase: str, drawn: random.Random, world: int) -> Death:
    delay = drawn.choice([0.0, drawn.uniform(0.001, 0.03)])
    spot = Spot(phase, count=drawn.randint(1, 4))
    return Death(f"in the {phase}", spot, drawn.randrange(world), _everyone(drawn), delay)


def _in_validation(drawn: random.Random, world: int) -> Death:
    return Death(
        "in validation", Spot("validate"), drawn.randrange(world), _everyone(drawn), drawn.uniform(0.001, 0.04)
    )


def _stopped(drawn: random.Random, world: int) -> Death:
    spot = Spot(drawn.choice(["forward-backward", "optimizer step"]), count=drawn.randint(1, 4))
    return Death("stopped", spot, drawn.randrange(world), _everyone(drawn), number=signal.SIGTERM)


def _in_tensors(drawn: random.Random, world: int) -> Death:
    spot = Spot(drawn.choice(["open", "write", "write", "fsync"]), r"\.safetensors$", drawn.randint(1, 2))
    return Death("in a save's tensors", spot, drawn.randrange(world), _everyone(drawn))


def _in_manifest(drawn: random.Random, world: int) -> Death:
    spot = Spot(drawn.choice(["open", "write", "fsync"]), r"manifest\.json$", drawn.randint(1, 2))
    return Death("in a save's manifest", spot, 0, _everyone(drawn))


def _in_rename(drawn: random.Random, world: int) -> Death:
    spot = Spot("rename", r"\.partial$", drawn.randint(1, 2))
    return Death("in a save's rename", spot, 0, _everyone(drawn))


def _in_first_save(drawn: random.Random, world: int) -> Death:
    made = drawn.choice([_in_tensors, _in_manifest, _in_rename])(drawn, world)
    return replace(made, kind="in two saves in a row", spot=replace(made.spot, count=1))


def _in_removal(drawn: random.Random, world: int) -> Death:
    """Of an old checkpoint, or of what a life before left half written."""
    spot = Spot("rename|remove", r"/step-\d+$|\.partial/", drawn.randint(1, 3))
    return Death("in a removal", spot, 0, _everyone(drawn))


def _at_an_operation(drawn: random.Random, world: int) -> Death:
    """On the checkpoints' files, whichever; the manifest is written in a hundred pieces, which would be most of all."""
    rank = drawn.randrange(world)
    spot = Spot("|".join(name for name in FILES if name != "write"), count=drawn.randint(1, 2 if rank else 14))
    return Death("at an operation on files", spot, rank, _everyone(drawn))


def _at_any_time(drawn: random.Random, world: int) -> Death:
    """A while from the first step on."""
    delay = drawn.uniform(0.001, 1.0)
    return Death(ANY_TIME, Spot("forward-backward"), drawn.randrange(world), _everyone(drawn), delay)


def _everyone(drawn: random.Random) -> bool:
    return drawn.random() < 0.5


ANY_TIME = "at any time"
KINDS = {
    "in the forward-backward": Kind(partial(_in_a_step, "forward-backward"), 6),
    "in the optimizer step": Kind(partial(_in_a_step, "optimizer step"), 6),
    "in validation": Kind(_in_validation, 6),
    "stopped": Kind(_stopped, 6),
    "in a save's tensors": Kind(_in_tensors, 6),
    "in a save's manifest": Kind(_in_manifest, 6),
    "in a save's rename": Kind(_in_rename, 6),
    "in two saves in a row": Kind(_in_first_save, 3, lives=2),
    "in a removal": Kind(_in_removal, 9),
    "at an operation on files": Kind(_at_an_operation, 6),
}


def _kinds(seed: int, drawn: random.Random) -> list[Kind]:
    """Two in turn and one more, in any order, as far as the epoch reaches. One that may come late comes last."""
    turn = list(KINDS.values())
    chosen = [turn[(2 * seed + place) % len(turn)] for place in range(2)]
    left = STEPS - 6 - sum(kind.steps for kind in chosen)
    chosen.append(drawn.choice([kind for kind in turn if kind.steps <= left]))
    drawn.shuffle(chosen)
    lives = [kind for kind in chosen for _ in range(kind.lives)]
    return [*lives, Kind(_at_any_time, STEPS)] if seed % 5 == 0 or drawn.random() < 0.3 else lives
