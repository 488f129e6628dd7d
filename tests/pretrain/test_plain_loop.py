"""The whole engine at one process against an independent training loop: transformers' GPT-2 and torch's AdamW.

The loop below is written from the documentation alone: it knows the model's first weights, each step's tokens and the numbers
in CONFIG, and nothing of the engine.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.model import ModelConfig
from pretrain.data.manifest import Manifest
from pretrain.data.prepare import prepare
from pretrain.data.preparing.options import Options
from pretrain.train import train
from tests.distributed import run_ranks
from tests.pretrain.models.references import Named, as_gpt2, load, make_gpt2, weights_of
from tests.training import Recorder, start_run, write_config

STEPS, WARMUP, PEAK, FINAL, CLIP, DECAY, BETAS, BATCH, MICRO = 24, 5, 1e-2, 0.1, 0.8, 0.1, (0.9, 0.95), 8, 2
CONFIG = {
    "num_layers: 4": "num_layers: 2",
    "num_kv_heads: 4, ": "",
    "positions: rope": "positions: learned",
    "norm: rms": "norm: layer",
    "activation: swiglu": "activation: gelu-tanh",
    "dropout: 0.1": "dropout: 0.0",
    "micro_size: 1": f"micro_size: {MICRO}",
    "clip_norm: 1.0": f"clip_norm: {CLIP}",
    "warmup: 2 steps, total: 10 steps": f"warmup: {WARMUP} steps, total: {STEPS} steps",
}


class Course(NamedTuple):
    """A training from its first weights to its last."""

    first: Named
    tokens: list[Tensor]  # each step's (BATCH, S + 1)
    logged: list[dict[str, Any]]
    last: Named


def engine_course(config_path: str, overrides: list[str]) -> Course:
    """In a rank: the real run."""
    run = start_run(config_path, overrides)
    model = run.built.stages[0].module
    first = weights_of(model)
    stream = run.sources.train
    numbers = torch.arange(STEPS * BATCH).view(STEPS, BATCH)
    tokens = [torch.from_numpy(stream.read(row.numpy())) for row in numbers]
    run.reporter = recorder = Recorder()
    run.resume()
    assert train(run) == "finished"
    return Course(first, tokens, recorder.logged, weights_of(model))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which each line is a document: sequences hold the ends of some, so their counts of targets differ."""
    folder = tmp_path_factory.mktemp("lines")
    text = Path(argparse.__file__).read_text().splitlines()
    (folder / "lines.txt").write_text("\n\n".join(line for line in text if line.strip()))
    out = folder / "shards"
    options = Options(vocab_size=400, validation=0.1, tokens_per_chunk=1024, split="blank-line")
    prepare([folder / "lines.txt"], out, options, processes=1, say=lambda _: None)
    return out


@pytest.fixture(scope="module", params=[0, 1])
def engine(request: pytest.FixtureRequest, lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Course:
    folder = tmp_path_factory.mktemp(f"zero-{request.param}")
    path = write_config(folder, lines, **CONFIG)
    return run_ranks(1, engine_course, str(path), [f"parallel.zero={request.param}"])[0]


@pytest.fixture(scope="module")
def plain(engine: Course, lines: Path) -> Course:
    """The same by transformers and torch."""
    return plain_course(engine, eos=Manifest.load(lines / "train").eos)


def plain_course(engine: Course, eos: int) -> Course:
    model = make_gpt2_like(engine.first)
    norms_and_biases = [p for p in model.parameters() if p.dim() == 1]
    others = [p for p in model.parameters() if p.dim() == 2]
    groups = [{"params": others, "weight_decay": DECAY}, {"params": norms_and_biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=1e-8)
    logged = []
    for number, tokens in enumerate(engine.tokens, start=1):
        parts = [losses(model, rows, eos) for rows in tokens.split(MICRO)]
        loss = torch.cat(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number)
        optimizer.step()
        line = {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": learning_rate(number)}
        logged.append({**line, "mean_of_means": sum(part.mean().item() for part in parts) / len(parts)})
    return Course({}, [], logged, {name: p.detach() for name, p in model.named_parameters()})


def make_gpt2_like(weights: Named) -> nn.Module:
    vocab_size, hidden = weights["embedding.weight"].shape
    config = ModelConfig(num_layers=2, hidden_size=hidden, num_heads=4, ffn_hidden_size=64)
    model = make_gpt2(config, vocab_size, len(weights["positions"]))
    load(model, as_gpt2(weights))
    return model.train()


def losses(model: nn.Module, rows: Tensor, eos: int) -> Tensor:
    """Of the targets that count: all but the first of a document."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    counted = inputs != eos
    return F.cross_entropy(model(inputs).logits[counted], targets[counted], reduction="none")


def learning_rate(step: int) -> float:
    """Of step 1, 2, ...: up to the peak in a line, down to its tenth along half a cosine."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    angle = math.pi * (step - WARMUP) / (STEPS - WARMUP)
    return PEAK * (FINAL + (1 - FINAL) * (math.cos(angle) + 1) / 2)


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["loss", "grad_norm", "learning_rate"])
def test_every_step_is_that_of_the_plain_loop(engine: Course, plain: Course, what: str) -> None:
    assert [line["step"] for line in engine.logged] == list(range(1, STEPS + 1))
    found, wanted = ([line[what] for line in course.logged] for course in (engine, plain))
    assert found == pytest.approx(wanted, rel=1e-5, abs=0)


def test_the_comparison_has_teeth(plain: Course) -> None:
    """The loss falls, some steps are clipped while others are not, and micro-batches differ in how many targets count:
    weighing each alike gives another loss."""
    assert plain.logged[-1]["loss"] < plain.logged[0]["loss"] - 1
    clipped = [line["grad_norm"] > CLIP for line in plain.logged]
    assert 3 < sum(clipped) < STEPS - 3
    naive = [abs(line["mean_of_means"] / line["loss"] - 1) > 1e-4 for line in plain.logged]
    assert sum(naive) > STEPS / 4


def test_last_weights_are_those_of_the_plain_loop(engine: Course, plain: Course) -> None:
    """But for key biases, whose true gradient is zero: Adam makes steps of their rounding errors."""
    found = as_gpt2(engine.last)
    assert set(found) == set(plain.last)
    for name, wanted in plain.last.items():
        weight, exact = found[name], wanted
        if name.endswith("c_attn.bias"):
            weight, exact = (torch.cat((x.chunk(3)[0], x.chunk(3)[2])) for x in (weight, exact))
        size = max(exact.norm().item(), 0.02 * math.sqrt(exact.numel()))
        assert (weight - exact).norm().item() <= 1e-5 * size, name
