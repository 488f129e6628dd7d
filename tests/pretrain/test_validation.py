"""The validation loss is the mean over all targets of the held-out samples, however they are cut into micro-batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from tests.training import write_config

SAMPLES = 130  # a document ends among them


def validate(config_path: str, overrides: list[str]) -> tuple[float, float, int]:
    """This rank's view of the whole result, by the run's own validation at its initial weights."""
    run = _run(config_path, overrides)
    run.built.train(False)
    result: tuple[float, float, int] = tuple(run.validation.run(run.built.schedule)[:3])
    return result


def by_brute_force(config_path: str, overrides: list[str], samples: int, across_documents: bool) -> tuple[float, int]:
    """Mean of -log p of each counted target, one sample at a time, from the model's logits in float64."""
    run = _run(config_path, overrides)
    run.built.train(False)
    model, stream = run.built.stages[0].module, run.sources.validation
    eos = run.tokenizer.eos
    losses: list[float] = []
    for number in range(samples):
        ids = torch.from_numpy(stream.read(np.array([number])))[0]
        chances = model.logits(ids[None, :-1])[0].double().log_softmax(-1)
        for place in range(len(ids) - 1):
            if across_documents or ids[place] != eos:
                losses.append(-chances[place, ids[place + 1]].item())
    return math.fsum(losses) / len(losses), len(losses)


def _run(config_path: str, overrides: list[str]) -> Any:
    from parallel.grid import start_grid
    from parallel.layout import Layout, rank_and_world
    from pretrain import runs
    from pretrain.data.sources import Sources
    from pretrain.interrupt import Interrupt
    from pretrain.train import Run

    world = rank_and_world()[1]
    config = runs.open_config(config_path, overrides, world)
    sources = Sources.open(config)
    return Run(config, start_grid(Layout.of(config.parallel, world), 60), sources, Interrupt())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> str:
    return str(write_config(tmp_path_factory.mktemp("validation"), tiny_data))


def options(micro: int, across: bool) -> list[str]:
    return [
        "model.num_layers=2",
        f"batch={{size: 144, micro_size: {micro}}}",
        f"monitor.validation_samples={SAMPLES}",
        f"objective.loss_across_documents={json.dumps(across)}",
    ]


@pytest.mark.parametrize("across", [True, False])
def test_it_equals_brute_force_at_any_micro_batch_size(config: str, across: bool) -> None:
    """130 samples in micro-batches of 1, 3 (the last one holds 1), 12 (10) and 144 (less than one)."""
    [(loss, count)] = run_ranks(1, by_brute_force, config, options(1, across), SAMPLES, across)
    assert count == SAMPLES * 32 if across else 0 < count < SAMPLES * 32
    for micro in (1, 3, 12, 144):
        [found] = run_ranks(1, validate, config, options(micro, across))
        assert found[0] == pytest.approx(loss, rel=1e-6), micro
        assert found[2] == count, micro


def losses_of_both(config_path: str, overrides: list[str]) -> tuple[float, float]:
    """Of the same held-out samples: as validation reports it, and as it would be trained."""
    run = _run(config_path, overrides)
    losses = []
    for training in (False, True):
        run.built.train(training)
        losses.append(run.validation.run(run.built.schedule).loss)
    return losses[0], losses[1]


def test_it_is_the_plain_cross_entropy_whatever_is_trained(config: str) -> None:
    plain = [*options(12, True), "model.dropout=0.0"]
    added = [*plain, "objective.label_smoothing=0.1", "objective.z_loss=0.01"]
    [(expected, _)] = run_ranks(1, losses_of_both, config, plain)
    [(found, trained)] = run_ranks(1, losses_of_both, config, added)
    assert found == expected
    assert trained > expected + 0.1, "z-loss alone adds 0.01 ln(512)^2"


@pytest.mark.parametrize("layout", ["", "parallel.tensor=2", "parallel.pipeline=2"])
def test_it_is_the_same_on_two_ranks(config: str, layout: str) -> None:
    """Shared by samples (44 micro-batches of 3; the last one, one rank's, holds 1), by heads, by layers."""
    [alone] = run_ranks(1, validate, config, options(3, False))
    for found in run_ranks(2, validate, config, [*options(3, False), *filter(None, [layout])]):
        assert found == pytest.approx(alone, rel=1e-6)


def test_all_held_out_samples_count_where_no_number_is_given(config: str, tiny_data: Path) -> None:
    manifest = json.loads((tiny_data / "validation" / "manifest.json").read_text())
    samples = (manifest["tokens"] - 1) // 32
    [(_, _, count)] = run_ranks(1, validate, config, [*options(144, True), "monitor.validation_samples=null"])
    assert count == 32 * samples
    [(_, _, more)] = run_ranks(1, validate, config, [*options(144, True), "monitor.validation_samples=1000000"])
    assert more == count


def test_bits_per_byte_are_of_the_text_behind_the_tokens(config: str, tiny_data: Path) -> None:
    """loss nats a token -> bits a token -> bits a byte, by the tokens and bytes that the shards say they hold."""
    manifest = json.loads((tiny_data / "validation" / "manifest.json").read_text())
    [(loss, bits, _)] = run_ranks(1, validate, config, options(8, True))
    assert bits == pytest.approx(loss / math.log(2) * manifest["tokens"] / manifest["text_bytes"])
    uniform = math.log(512)
    assert loss == pytest.approx(uniform, rel=0.01), "an untrained model knows nothing"
