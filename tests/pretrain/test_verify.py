"""verify says "the same" of layouts that are, and finds and names three classic faults that are planted here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pretrain import comparison, ranks, verify
from pretrain.__main__ import main
from pretrain.config.load import load_config
from pretrain.config.run import Config
from pretrain.errors import UserError
from tests.distributed import run_ranks
from tests.training import write_config

STEPS = 3
ALLOWED = comparison.Allowed()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Config:
    """Tied embeddings, biases, dropout, targets that differ in number from micro-batch to micro-batch."""
    path = write_config(tmp_path_factory.mktemp("verify"), tiny_data)
    return load_config(path, ["model.positions=learned", "optimizer.learning_rate=2e-3"])


@pytest.fixture(scope="module")
def one(config: Config) -> comparison.Trace:
    return run_ranks(1, verify.trace, config, STEPS)[0]


def compared(config: Config, one: comparison.Trace, layout: str, plant: Callable[[], Any] | None = None) -> Any:
    case = verify.case_of(config, layout)
    other = run_ranks(case.processes, planted, plant, case.config)[0]
    return comparison.compare(layout, case.processes, one, other, ALLOWED)


def planted(plant: Callable[[], Any] | None, config: Config) -> comparison.Trace:
    if plant is not None:
        plant().start()  # for this rank's life
    return verify.trace(config, STEPS)


def no_sum_of_norm_gradients() -> Any:
    return mock.patch("parallel.layers.mark_summed", lambda parameter, axis: parameter)


def tied_embedding_twice() -> Any:
    from parallel import gradients

    def twice(parameter: Any, group: Any) -> None:
        gradients.sum_tied(parameter, group)
        if parameter is not None and group is not None:
            gradients.main_gradient(parameter).mul_(2.0)  # type: ignore[union-attr]

    return mock.patch("parallel.replicated.sum_tied", twice)


def mean_of_each_micro_batch() -> Any:
    def run(self: Any, batches: Any, scale: float, forward_only: bool = False) -> torch.Tensor:
        total = torch.zeros(())
        for batch in batches:
            loss = self.stages[0](batch)
            (loss / batch.mask.sum() / len(batches)).backward()
            total += loss.detach()
        return total

    return mock.patch("parallel.schedules.Schedule.run", run)


def test_layouts_that_train_the_same_are_told_the_same(config: Config, one: comparison.Trace) -> None:
    for layout in ("tp=2,sp", "pp=2,dp=2,zero=1", "cp=2,micro=2"):
        found = compared(config, one, layout)
        assert found.same, found
        assert max(found.loss, found.grad_norm, found.gradient, found.weight) < 1e-5


def test_a_missing_sum_of_norm_gradients_is_found_and_named(config: Config, one: comparison.Trace) -> None:
    found = compared(config, one, "tp=2,sp", no_sum_of_norm_gradients)
    assert found.step == 1
    assert found.loss < 1e-2  # the loss alone would hardly show it
    # the norms' parameters and the row layers' biases and positions: all that is replicated and sees a slice
    replicated = ("norm", "attention.out.bias", "feed_forward.down.bias", "positions")
    assert found.parameters and all(any(kind in name for kind in replicated) for name in found.parameters)
    assert any("norm" in name for name in found.parameters)


def test_a_tied_embedding_counted_twice_is_found_and_named(config: Config, one: comparison.Trace) -> None:
    found = compared(config, one, "pp=2", tied_embedding_twice)
    assert (found.step, found.parameters) == (1, ("embedding.weight",))


def test_a_mean_of_each_micro_batch_is_found_in_most_gradients(config: Config, one: comparison.Trace) -> None:
    found = compared(config, one, "dp=1", mean_of_each_micro_batch)
    assert found.step is not None
    assert len(found.parameters) > len(one.weights) / 2


def test_key_biases_are_neither_a_fault_nor_waved_through(config: Config, one: comparison.Trace) -> None:
    """Their true gradient is zero: what they have is rounding, which Adam blows up. But a real gradient would be seen."""
    biases = [name for name in one.weights if name.endswith("attention.k.bias")]
    assert biases and not set(biases) & set(comparison.without_noise(one))
    moved = {name: sketch + (1e-3 if name in biases else 0.0) for name, sketch in one.gradients[1].items()}
    other = comparison.Trace(**{**vars(one), "gradients": [one.gradients[0], moved, *one.gradients[2:]]})
    found = comparison.compare("moved", 1, one, other, ALLOWED)
    assert (found.step, sorted(found.parameters)) == (2, sorted(biases))


def test_what_parts_first_is_told(one: comparison.Trace) -> None:
    hashes = [*one.hashes[:1], "another", *one.hashes[2:]]
    losses = [*one.losses[:2], one.losses[2] * (1 + 1e-4)]
    other = comparison.Trace(**{**vars(one), "hashes": hashes, "losses": losses})
    found = comparison.compare("x", 1, one, other, ALLOWED)
    assert (found.step, found.what) == (2, "the samples differ")
    other = comparison.Trace(**{**vars(one), "losses": losses})
    assert comparison.compare("x", 1, one, other, ALLOWED).what == "the loss differs"
    norms = [one.norms[0] * 1.001, *one.norms[1:]]
    other = comparison.Trace(**{**vars(one), "norms": norms})
    assert "of the same gradients" in comparison.compare("x", 1, one, other, ALLOWED).what


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """verify's ranks, forked from the tests' own warm process."""

    def fork(world: int, function: Any, *args: Any, folder: Path, timeout: float) -> Any:
        return run_ranks(world, function, *args, timeout=timeout)[0]

    monkeypatch.setattr(ranks, "run_ranks", fork)


def test_the_command_prints_a_table_and_json_and_exits_0(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], forked: None
) -> None:
    path, out = write_config(tmp_path, tiny_data), tmp_path / "found.json"
    arguments = [
        "verify",
        str(path),
        "optimizer.learning_rate=2e-3",
        "--layouts",
        "tp=2",
        "dp=2,zero=2",
        "--steps",
        "2",
        "--json",
        str(out),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "tp=2" in said and "dp=2,zero=2" in said and said.count("same") == 2
    found = json.loads(out.read_text())
    assert [(row["layout"], row["processes"], row["same"]) for row in found["layouts"]] == [
        ("tp=2", 2, True),
        ("dp=2,zero=2", 2, True),
    ]
    assert not (tmp_path / "run").exists()  # it leaves nothing behind


def test_a_difference_exits_1_and_names_the_parameter(
    tmp_path: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork(world: int, function: Any, *args: Any, folder: Path, timeout: float) -> Any:
        config, steps = args
        assert steps == STEPS
        return run_ranks(world, planted, tied_embedding_twice if world > 1 else None, config)[0]

    monkeypatch.setattr(ranks, "run_ranks", fork)
    path = write_config(tmp_path, tiny_data)
    assert main(["verify", str(path), "--layouts", "pp=2", "--steps", str(STEPS)]) == 1
    assert "pp=2: step 1: 1 of " in (said := capsys.readouterr().out) and "embedding.weight" in said


@pytest.mark.thorough
def test_bf16_is_allowed_twice_what_micro_batch_sizes_differ(config: Config) -> None:
    bf16 = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "bf16"})})
    one, *others = (
        run_ranks(1, verify.trace, verify.with_micro(bf16, size), 8)[0] for size in (1, *verify.other_micro_sizes(bf16))
    )
    allowed = comparison.spread(one, others, tensor=2)
    assert 1e-4 < allowed.grad_norm < 1e-2
    case = verify.case_of(bf16, "tp=2,dp=2,zero=1")
    other = run_ranks(case.processes, verify.trace, case.config, 8)[0]
    found = comparison.compare("", 4, one, other, allowed)
    assert found.same, found


def test_all_that_is_wrong_with_the_layouts_is_told_at_once(config: Config) -> None:
    with pytest.raises(UserError) as caught:
        verify._cases(config, ["tp=3", "pp=2,zero=2", "xy=2", "dp=2"])
    said = str(caught.value)
    assert "tp=3: parallel.tensor" in said and "pp=2,zero=2: parallel.zero" in said and "xy=2" in said
    assert "dp=2:" not in said


def test_tiny_keeps_the_options() -> None:
    big = load_config("configs/gpt/gpt3-175b.yaml")
    small = verify.tiny(big)
    assert small.model.attention_window == [None, 8]
    same = ("positions", "norm", "activation", "biases", "tie_embeddings", "vocab_size")
    assert all(getattr(small.model, name) == getattr(big.model, name) for name in same)
    assert small.optimizer == big.optimizer and small.objective == big.objective


def test_a_rank_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    """Through verify's own warm process."""
    with pytest.raises(ranks.RankFailed, match=r"(?s)rank 1: KeyError: 'lost'.*these were its words"):
        ranks.run_ranks(2, lose_rank_one, folder=tmp_path, timeout=60)


def lose_rank_one() -> None:
    import os

    if os.environ["RANK"] == "1":
        print("these were its words", flush=True)
        raise KeyError("lost")
