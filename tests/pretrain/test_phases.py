"""Phases of other sequence lengths: one run, whatever kills it and whatever layout it goes on under."""

from __future__ import annotations

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.backends import Backends, Call
from kernels.noise import sample_keys
from parallel.initial import initialise
from parallel.layers import Parts
from parallel.layout import Layout
from parallel.stages import Cut, Stage
from pretrain import comparison, memory, verify
from pretrain.config.load import load_config
from pretrain.config.model import ModelConfig
from pretrain.config.run import Config
from pretrain.data.order import Order, Source
from pretrain.data.sources import Sources
from pretrain.flops import flops_per_token, needed_flops
from pretrain.models.gpt import GPT
from pretrain.rates import Rates
from tests.distributed import run_ranks
from tests.pretrain import running
from tests.training import write_config

# 6 steps of 12 sequences of 16 tokens, then 6 of 8 sequences of 32.
PHASES = (
    "data.phases=[{seq_length: 16, length: 6 steps, batch_size: 12, micro_size: 4}]",
    "batch={size: 8, micro_size: 2}",
    "checkpoint.every=2 steps",
)
BERT = (
    "model={kind: bert, num_layers: 2, hidden_size: 32, num_heads: 4, norm_position: post, dropout: 0.1, initial_scale: 0.1}",
    "objective={kind: masked, pairs: next}",
)


@functools.cache
def uninterrupted(shards: Path) -> tuple[Path, str]:
    """A run to compare with, and what it told."""
    folder = shards.parent / "phases"
    ran = running.train(
        folder, shards, *PHASES, "monitor.tensorboard=true", "monitor.peak_tflops=0.5", "checkpoint.keep_last=9"
    )
    assert ran.code == 0, ran.told
    return folder / "run", ran.out


def test_killed_in_either_phase_and_at_the_border_it_is_the_same_run(tmp_path: Path, tiny_data: Path) -> None:
    run, whole = tmp_path / "run", uninterrupted(tiny_data)[0]
    for kept, count in ((4, 5), (6, 3), (8, 3)):  # the last checkpoint, and in which of its own steps a session dies
        running.train_killed(
            tmp_path, tiny_data, *PHASES, "monitor.tensorboard=true", fault=partial(running.kill_in_step, count)
        )
        assert running.steps_of(run)[-1] == kept
    running.assert_same_checkpoint(whole, run, 8)
    # The last session has two processes and other micro-batches: the same samples, and so the same losses.
    layout = ("parallel.zero=1", PHASES[0].replace("micro_size: 4", "micro_size: 2"))
    ran = running.train(tmp_path, tiny_data, *PHASES, *layout, world=2)
    assert ran.code == 0 and "going on after step 8" in ran.out and "phase 2 of 2" in ran.out, ran.told
    ours, theirs = ([line for line in running.numbers_of(folder) if "loss" in line] for folder in (run, whole))
    assert [line for line in ours if line["step"] <= 8] == [line for line in theirs if line["step"] <= 8]
    for one, other in zip(ours, theirs, strict=True):
        assert one["batch_hash"] == other["batch_hash"] and one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_run_tells_its_phases_and_counts_what_it_has_seen(tiny_data: Path) -> None:
    run, out = uninterrupted(tiny_data)
    first, second = (
        "phase 1 of 2: sequences of 16 tokens up to step 6",
        "phase 2 of 2: sequences of 32 tokens up to step 12",
    )
    lines = out.splitlines()
    assert lines.count(first) == 1 and lines.count(f"step 6: {second}") == 1
    assert f"12 steps, {6 * 12 * 16 + 6 * 8 * 32:,} tokens".replace("2,688", "2.69K") in out
    logged = [line for line in running.lines_of(run) if "loss" in line]
    assert [line["seq_length"] for line in logged] == [16] * 6 + [32] * 6
    assert [line["batch_size"] for line in logged] == [12] * 6 + [8] * 6
    seen = np.cumsum([12 * 16] * 6 + [8 * 32] * 6).tolist()
    assert [line["tokens"] for line in logged] == seen
    assert json.loads((run / "summary.json").read_text())["tokens"] == seen[-1]
    validated = [line["tokens"] for line in running.lines_of(run) if "validation_loss" in line]
    assert validated == [0, seen[3], seen[7], seen[11]]
    config = load_config(run / "config.yaml")
    per_epoch = Sources.open(config).train.samples_per_epoch * 32
    scalars = running.scalars_of(run)
    assert [value for _, value in scalars["optimizer/seq_length"]] == [16] * 6 + [32] * 6
    assert [value for _, value in scalars["optimizer/epochs"]] == pytest.approx([tokens / per_epoch for tokens in seen])
    # A phase's first step compiles, and counts for no rate; each phase has its own FLOPs a token.
    rated = [line for line in logged if "tokens_per_second" in line]
    assert [line["step"] for line in rated] == [2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    for line in rated:
        assert line["tokens_per_second"] == pytest.approx(
            line["batch_size"] * line["seq_length"] / line["step_seconds"]
        )
    needed = [line["mfu"] * 0.5e12 / line["tokens_per_second"] for line in rated]
    assert needed[:5] == pytest.approx([needed[0]] * 5) and needed[5:] == pytest.approx([needed[-1]] * 5)
    more = (
        3 * 2 * 2 * config.model.num_layers * config.model.hidden_size * (32 - 16) / 2
    )  # of each score's two products
    assert needed[-1] - needed[0] == pytest.approx(more)


def test_an_interval_over_a_border_has_the_flops_of_both_phases() -> None:
    phases = [{"seq_length": 16, "length": "6 steps"}]
    config = Config.model_validate({"data": {"seq_length": 32, "phases": phases}})
    short, long = (needed_flops(phase, 100) for phase in config.phases)
    assert short["mfu"] == flops_per_token(config.model, 100, 16) < long["mfu"]
    rates = Rates("tokens")
    for tokens, flops in ((9, short), (10, short), (3, long)):  # the first is not counted
        rates.add(tokens, 0.0, flops)
    assert rates.tokens == 13 and rates.flops["mfu"] == 10 * short["mfu"] + 3 * long["mfu"]


# -- the data --------------------------------------------------------------------------------------------------------


def sources_of(tmp_path: Path, shards: Path, *overrides: str) -> Sources:
    return Sources.open(load_config(write_config(tmp_path, shards), overrides))


def test_a_phases_stream_is_that_of_its_length_and_goes_on_in_the_epoch(tmp_path: Path, tiny_data: Path) -> None:
    sources = sources_of(tmp_path, tiny_data, "data.phases=[{seq_length: 16, length: 5 steps, batch_size: 7}]")
    (first, second), alone = sources.phases, sources_of(tmp_path, tiny_data).train
    assert (first.seq_length, second.seq_length) == (16, 32) and (first.begin, second.begin) == (0, 35)
    passed = 18  # sequences of 32 that the first phase's 5 x 7 x 16 tokens are
    count = second.samples_per_epoch
    numbers = np.arange(35, 35 + count)
    assert np.array_equal(second.read(numbers), alone.read(numbers - 35 + passed))
    for epoch in (0, 1):
        samples = second.order.locate(35 - passed + count * epoch + np.arange(count))[1]
        assert sorted(samples.tolist()) == list(range(count))
    with pytest.raises(ValueError, match="begin at 17"):
        second.read(np.array([16]))


def test_the_recipe_says_the_phases(tmp_path: Path, tiny_data: Path) -> None:
    def fingerprint(*phases: str) -> str:
        return sources_of(tmp_path, tiny_data, f"data.phases=[{', '.join(phases)}]").fingerprint

    one = "{seq_length: 16, length: 5 steps}"
    variants = [
        (one,),
        ("{seq_length: 8, length: 5 steps}",),
        ("{seq_length: 16, length: 6 steps}",),
        ("{seq_length: 16, length: 5 steps, batch_size: 4}",),
        (one, one),
        (),
    ]
    prints = [fingerprint(*variant) for variant in variants]
    assert len(set(prints)) == len(prints)
    assert fingerprint("{seq_length: 16, length: 5 steps, micro_size: 3}") == prints[0]
    plain = sources_of(tmp_path, tiny_data)
    assert plain.fingerprint == prints[-1] and "begin" not in plain.train.recipe  # runs of one phase go on as they were


def test_a_run_of_less_than_an_epoch_reads_on_in_chunks_it_has_not_read() -> None:
    """But for those that the lanes were in the middle of."""
    lanes, window, chunks = 2, 2, 64
    short = Order([Source(chunks * 16, 16)], 1, lanes=lanes, window=window)
    read = short.locate(np.arange(chunks * 8))[1] // 16  # half of all
    long = Order([Source(chunks * 8, 8)], 1, lanes=lanes, window=window, first=chunks * 8 - chunks * 4)
    then = long.locate(np.arange(chunks * 8, chunks * 8 + chunks * 2))[1] // 8  # another quarter
    assert len(set(read) & set(then)) <= lanes * window
    anew = Order([Source(chunks * 8, 8)], 1, lanes=lanes, window=window, first=chunks * 8)
    assert set(anew.locate(np.arange(chunks * 8, chunks * 8 + chunks * 2))[1] // 8) <= set(read)  # as if not told


# -- layouts ---------------------------------------------------------------------------------------------------------

SAME = (
    "data.phases=[{seq_length: 16, length: 2 steps, batch_size: 16}]",
    "batch={size: 8, micro_size: 4}",
    "optimizer.epsilon=1e-5",
    "optimizer.learning_rate=1e-3",
)
MODELS = {"gpt": ("model.num_layers=2", "model.initial_scale=0.1"), "bert": BERT}


@functools.cache
def alone(shards: Path, model: str) -> comparison.Trace:
    found: comparison.Trace = run_ranks(1, verify.trace, config_of(shards, model), 4)[0]
    return found


def config_of(shards: Path, model: str) -> Config:
    return load_config(write_config(shards.parent, shards), [*SAME, *MODELS[model]])


@pytest.mark.parametrize(("model", "layout"), [
    ("gpt", "tp=2,sp"), ("gpt", "pp=2,micro=2"), ("gpt", "dp=2,zero=2"), ("bert", "cp=2"), ("bert", "dp=2,zero=1"),
])  # fmt: skip
def test_losses_are_those_of_one_process_across_the_border(tiny_data: Path, model: str, layout: str) -> None:
    case = verify.case_of(config_of(tiny_data, model), layout)
    other = run_ranks(case.processes, verify.trace, case.config, 4)[0]
    found = comparison.compare(layout, case.processes, alone(tiny_data, model), other, comparison.Allowed())
    assert found.same, f"step {found.step}: {found.what} {found.parameters}"


def test_verify_makes_phases_tiny_too(tiny_data: Path) -> None:
    config = verify.tiny(config_of(tiny_data, "gpt"))
    (phase,) = config.data.phases
    assert (phase.seq_length, str(phase.length), config.data.seq_length) == (16, "2 steps", 32)
    assert verify.case_of(config, "dp=2").config.data.phases[0].micro_size is None


# -- the model -------------------------------------------------------------------------------------------------------


def test_who_computes_attention_is_chosen_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 24 shows all of 16 tokens: what can do no windows may compute these, and only these."""
    asked: list[Any] = []

    def choose(self: Backends, call: Call) -> str:
        return "torch" if call.window else "flash"

    def attention(
        self: Parts, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backend: str, **_: Any
    ) -> torch.Tensor:
        asked.append(backend)
        return q

    monkeypatch.setattr(Backends, "choose", choose)
    monkeypatch.setattr(Parts, "attention", attention)
    config = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, attention_window=24, positions="rope")
    model = GPT(config, Parts(), 50, 32)
    model.prepare(16)
    initialise(model, 1)
    for length in (16, 32, 20):  # nobody was chosen for 20: as for the longest
        ids = torch.zeros(1, length, dtype=torch.int64)
        model(ids, ids, torch.ones(1, length), sample_keys(1, torch.arange(1)))
    assert asked == ["flash", "torch", "torch"]


def test_torch_compile_makes_one_graph_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr("parallel.stages.torch.compile", partial(torch.compile, backend=counter))
    config = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, positions="learned")
    model = GPT(config, Parts(), 50, 32)
    model.prepare(16)
    initialise(model, 1)
    stage = Stage(model, Cut(range(1), True, True), compile=True)
    for length in (16, 16, 32, 32, 16):
        ids = torch.zeros(2, length, dtype=torch.int64)
        stage((ids, ids, torch.ones(2, length), sample_keys(1, torch.arange(2)), None)).backward()
    assert counter.frame_count == 2


def test_the_memory_formula_takes_the_highest_phase() -> None:
    def peak(**phase: int) -> int:
        phases = [{"seq_length": 16, "length": "5 steps", **phase}] if phase else []
        data = {"seq_length": 32, "phases": phases}
        model = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "positions": "learned"}
        config = Config.model_validate(
            {"model": model, "data": data, "batch": {"size": 8, "micro_size": 2}, "precision": {"compute": "fp32"}}
        )
        return memory.memory(config, Layout(), [2], 100).peak

    assert peak(micro_size=2) == peak()
    assert peak(batch_size=64, micro_size=64) > 2 * peak()
