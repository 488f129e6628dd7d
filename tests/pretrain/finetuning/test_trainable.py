"""Weights that do not learn, and LoRA: which they are, that every layout trains the same, that a run goes on bitwise, and
what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from parallel.layout import Layout
from pretrain import comparison, runs, verify
from pretrain.checkpoint import latest, read_weight, weight_shapes
from pretrain.config.load import checked_config
from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.merging import Merged
from pretrain.sizes import Sizes, parameters_of
from pretrain.trainable import check_trainable, frozen_weights
from tests.distributed import run_ranks
from tests.pretrain import running
from tests.pretrain.finetuning import tiny
from tests.training import write_config

STEPS = 3
LORA = "model.lora={rank: 3, alpha: 6, targets: [q, v, out, up, down], dropout: 0.1}"
FREEZE = 'optimizer.freeze=[embedding, blocks.0.attention, "*.norm_2", blocks.1.feed_forward.up.bias]'
SHORT = (
    "schedule.total=6 steps",
    "schedule.warmup=1 steps",
    "checkpoint.every=3 steps",
    "monitor.validate_every=3 steps",
)
MIXOUT = "optimizer.mixout=0.4"
TWO_STACKS = (
    "model={kind: encoder-decoder, num_layers: 1, hidden_size: 32, num_heads: 4, positions: sinusoidal, dropout: 0.1}",
    "objective={kind: prefix}",
)
SHAPE: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "activation": "swiglu"}


# -- every layout ------------------------------------------------------------------------------------------------------


class Traces:
    """One process's runs, made once."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards
        self.made: dict[str, tuple[Config, comparison.Trace]] = {}

    def of(self, name: str) -> tuple[Config, comparison.Trace]:
        if name not in self.made:
            config = self._config(name)
            self.made[name] = config, run_ranks(1, verify.trace, verify._alone(config), STEPS)[0]
        return self.made[name]

    def _config(self, name: str) -> Config:
        folder = self.folder / name
        folder.mkdir()
        stable = ("optimizer.epsilon=1e-5", f"run.dir={folder / 'run'}")
        if name == "bottom":  # a tied embedding at both ends of the pipeline, and a stage that learns nothing
            fields = ["optimizer.freeze=3", "model.positions=learned", "optimizer.learning_rate=2e-3", *stable]
            return runs.open_config(str(write_config(folder, self.shards)), fields, 1)
        if name == "two stacks":  # an encoder-decoder, whose factors are also where the decoder sees the encoder
            begun = running.train(folder / "begun", self.shards, *TWO_STACKS, "schedule.total=1 steps")
            assert begun.code == 0, begun.told
            fields = [f"model={{initial: {folder / 'begun' / 'run'}}}", LORA, TWO_STACKS[1], *stable]
            return runs.open_config(str(write_config(folder, self.shards)), fields, 1)
        path = tiny.write_config(folder, "classification", tiny.bert(self.shards))
        return runs.open_config(str(path), [{"lora": LORA, "names": FREEZE, "mixout": MIXOUT}[name], *stable], 1)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Traces:
    return Traces(tmp_path_factory.mktemp("trainable"), tiny_data)


LAYOUTS = {
    "names": ("tp=2,sp", "dp=2,zero=2,offload", "dp=2,zero=3"),
    "bottom": ("pp=2", "dp=2,zero=1"),
    "lora": ("tp=2,sp", "cp=2,zero=2", "pp=2"),
    "two stacks": ("tp=2,sp",),
    "mixout": ("tp=2,sp", "cp=2,zero=1", "dp=2,zero=2"),
}


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name, held in LAYOUTS.items() for layout in held])
def test_every_layout_trains_the_same(name: str, layout: str, traces: Traces) -> None:
    config, one = traces.of(name)
    case = verify.case_of(config, layout)
    found = run_ranks(case.processes, verify.trace, case.config, STEPS)[0]
    learning = one.gradients[0].keys()
    assert learning == found.gradients[0].keys() and (learning < one.weights.keys()) == (name != "mixout")
    compared = comparison.compare(layout, case.processes, one, found, comparison.Allowed(weight=4e-5))
    assert compared.same, f"step {compared.step}: {compared.what} {compared.parameters}"


def faulty_trace(config: Config) -> comparison.Trace:
    """In a rank: what tensor ranks see of the factors that each has whole is not summed."""
    with mock.patch("parallel.adapters.mark_partial", lambda parameter, axis: parameter):
        return verify.trace(config, STEPS)


def test_the_comparison_sees_factors_whose_gradients_are_not_summed(traces: Traces) -> None:
    config, one = traces.of("lora")
    case = verify.case_of(config, "tp=2")
    compared = comparison.compare("tp=2", 2, one, run_ranks(2, faulty_trace, case.config)[0], comparison.Allowed())
    assert compared.step == 1 and all("lora" in name for name in compared.parameters), compared


# -- runs --------------------------------------------------------------------------------------------------------------


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    found = latest(run)
    assert found is not None
    return {name: read_weight(found, name) for name in weight_shapes(found)}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A finished run with LoRA, that was stopped half way and started again, next to one that was not."""
    folder = tmp_path_factory.mktemp("adapted")
    for name in ("halted", "whole"):
        config = tiny.write_config(folder / name, "classification", tiny.bert(tiny_data), train=48)
        halt = ["run.stop_at=0.5 of total"] if name == "halted" else []
        ran = running.command("train", config, *SHORT, LORA, *halt)
        assert ran.code == 0, ran.told
        assert "parameters, " in ran.out and " of which learn (" in ran.out
        if halt:
            assert running.steps_of(folder / name / "run") == [3]
            ran = running.command("train", folder / name / "run", "run.stop_at=null")
            assert ran.code == 0, ran.told
    return folder / "whole" / "run"


def test_a_run_with_lora_goes_on_bitwise(adapted: Path) -> None:
    halted = adapted.parent.parent / "halted" / "run"
    ours, theirs = (running.tensors_of(run, 6) for run in (halted, adapted))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_only_the_factors_and_the_heads_have_learned(adapted: Path, tiny_data: Path) -> None:
    """They alone have moments; everything else is the initial model's, bit for bit."""
    before, after = weights_of(tiny.bert(tiny_data)), weights_of(adapted)
    moved = {name for name, value in after.items() if name not in before or not value.equal(before[name])}
    learned = {
        name for name in after if name.endswith((".lora_a", ".lora_b")) or name.startswith(("task_head", "pooler"))
    }
    assert moved == learned and len(learned) == 2 * 2 * 5 + 4
    moments = {name.split("exp_avg/")[1] for name in running.tensors_of(adapted, 6) if ":exp_avg/" in name}
    assert moments == learned
    summary = json.loads((adapted / "summary.json").read_text())
    assert summary["trainable_parameters"] == sum(after[name].numel() for name in learned)
    assert summary["parameters"] == sum(value.numel() for value in after.values())


def test_a_run_with_lora_predicts_and_another_starts_from_its_merged_weights(adapted: Path, tmp_path: Path) -> None:
    dev = adapted.parent / "dev.tsv"
    judged = [line for line in running.lines_of(adapted) if "validation_loss" in line][-1]
    ran = running.command("evaluate", adapted, "--data", dev)
    assert ran.code == 0 and json.loads(ran.out)["accuracy"] == pytest.approx(judged["validation_accuracy"])
    config = tiny.write_config(tmp_path, "classification", adapted, train=48)
    still = (
        "schedule.total=1 steps",
        "schedule.warmup=0 steps",
        "checkpoint.every=1 steps",
        "optimizer.freeze=[blocks]",
    )
    ran = running.command("train", config, *still)
    assert ran.code == 0, ran.told
    before, after = weights_of(adapted), weights_of(tmp_path / "run")
    assert not any("lora" in name for name in after)
    name = "blocks.1.attention.v"
    product = before[f"{name}.lora_b"].double() @ before[f"{name}.lora_a"].double()
    assert product.abs().max() > 1e-4
    merged = before[f"{name}.weight"].double() + 6 / 3 * product
    assert after[f"{name}.weight"].allclose(merged.float(), rtol=0, atol=1e-7)
    assert after["blocks.1.attention.k.weight"].equal(before["blocks.1.attention.k.weight"])


def test_boxes_of_merged_weights_are_those_of_the_whole(adapted: Path) -> None:
    found = latest(adapted)
    assert found is not None
    merged = Merged(found, runs.run_config(adapted).model)
    whole = merged.read("blocks.0.feed_forward.down.weight")
    assert merged.read_box("blocks.0.feed_forward.down.weight", (5, 17), (9, 30)).equal(whole[5:14, 17:47])


def test_pre_training_goes_on_with_lora_and_writes_text(tiny_data: Path, tmp_path: Path) -> None:
    fields = (
        f"model={{initial: {tiny.gpt(tiny_data)}, lora: {{rank: 2, targets: [k, gate]}}}}",
        "schedule.total=3 steps",
    )
    ran = running.train(tmp_path, tiny_data, *fields)
    assert ran.code == 0, ran.told
    ran = running.command("generate", tmp_path / "run", "--prompt", "def ", "--max-tokens", "4")
    assert ran.code == 0, ran.told


def test_a_run_with_mixout_goes_on_bitwise_and_only_from_the_same_model(tiny_data: Path, tmp_path: Path) -> None:
    """The initial model is a copy here, which then is trained further."""
    initial = tmp_path / "initial"
    shutil.copytree(tiny.bert(tiny_data), initial)
    for name in ("halted", "whole"):
        config = tiny.write_config(tmp_path / name, "classification", initial, train=48)
        halt = ["run.stop_at=0.5 of total"] if name == "halted" else []
        ran = running.command("train", config, *SHORT, MIXOUT, *halt)
        assert ran.code == 0, ran.told
    shutil.copytree(tmp_path / "halted" / "run", tmp_path / "later")
    ran = running.command("train", tmp_path / "halted" / "run", "run.stop_at=null")
    assert ran.code == 0, ran.told
    ours, theirs = (running.tensors_of(tmp_path / name / "run", 6) for name in ("halted", "whole"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    shutil.rmtree(running.checkpoint_folder(initial, 4))
    shutil.copytree(running.checkpoint_folder(tmp_path / "whole" / "run", 6), running.checkpoint_folder(initial, 6))
    running.assert_refused(
        running.command("train", tmp_path / "later", "run.stop_at=null"), "was mixed with other weights than"
    )


# -- which they are, and what is refused -------------------------------------------------------------------------------


def config_of(freeze: Any = 0, lora: Any = None, **model: Any) -> Config:
    values = {**SHAPE, **model} | ({} if lora is None else {"lora": lora, "initial": "a run"})
    objective = {"kind": "prefix" if model.get("kind") == "encoder-decoder" else "causal"}
    given = {"model": values, "data": {"seq_length": 32}, "objective": objective, "optimizer": {"freeze": freeze}}
    return checked_config(given, "test")


def frozen(*given: Any, **model: Any) -> set[str]:
    return set(frozen_weights(config_of(*given, **model), Sizes(300)))


def test_layers_are_counted_from_the_bottom_and_names_stand_for_all_below_them() -> None:
    assert frozen(0) == frozen([]) == set()
    found = frozen(2)
    assert {"embedding.weight", "positions", "blocks.1.norm_2.bias"} < found
    assert not any(name.startswith(("blocks.2", "blocks.3", "norm")) for name in found)
    two = frozen(5, kind="encoder-decoder")
    assert {"encoder.blocks.3.norm_1.bias", "decoder.positions", "decoder.blocks.0.cross.k.weight"} < two
    assert not any(name.startswith(("decoder.blocks.1", "decoder.norm", "encoder.norm")) for name in two)
    assert frozen(["blocks.1"]) == {name for name in found if name.startswith("blocks.1.")}
    assert frozen(["*.norm_?.bias"]) == {f"blocks.{n}.norm_{k}.bias" for n in range(4) for k in (1, 2)}


def test_with_lora_the_factors_learn_but_for_what_is_frozen_besides() -> None:
    lora = {"rank": 2, "targets": ["q", "gate"]}
    left = {
        f"blocks.{n}.{part}.lora_{k}" for n in range(4) for part in ("attention.q", "feed_forward.gate") for k in "ab"
    }
    every = frozen(0, lora)
    assert not every & left and {"embedding.weight", "norm.weight", "blocks.3.attention.q.weight"} < every
    assert {name for name in frozen(["blocks.0"], lora) if "lora" in name} == {
        n for n in left if n.startswith("blocks.0")
    }


@pytest.mark.parametrize("kind", ["gpt", "encoder-decoder"])
@pytest.mark.parametrize("targets", [["q"], ["k", "v", "out"], ["up", "gate", "down"]])
def test_the_factors_are_counted(targets: list[str], kind: str) -> None:
    from parallel.layers import Parts
    from pretrain.models.make import make_model

    config = config_of(0, {"rank": 3, "targets": targets}, num_kv_heads=2, ffn_hidden_size=40, kind=kind)
    with torch.device("meta"):
        model = make_model(config, Parts(), Sizes(128))
    assert parameters_of(config, Sizes(128)) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((5,), "optimizer.freeze: 5 layers, but the model has 4; give up to 4"),
        ((["embeding"],), "no weight has the name 'embeding'; did you mean embedding"),
        ((["blocks.0.attention.qq"],), "did you mean blocks.0.attention.q"),
        ((["nothing-like-it"],), "there are: positions, embedding, blocks, norm"),
        ((["blocks.0.attention.q"],), "blocks.0.attention.q.weight in one product with blocks.0.attention.k.weight"),
        ((["*"],), "nothing is left to learn"),
        ((0, {"targets": ["gate"]}, "gelu"), "model.lora.targets: there is no 'gate' in a feed-forward layer of gelu"),
    ],
)
def test_names_that_are_wrong_are_told(given: tuple[Any, ...], words: str) -> None:
    activation = {"activation": given[2]} if len(given) > 2 else {}
    with pytest.raises(UserError) as error:
        frozen_weights(config_of(*given[:2], **activation), Sizes(300))
    assert words in str(error.value)


def test_a_stage_that_learns_nothing_is_refused_where_the_optimizer_is_shared_out() -> None:
    config, shape, layers = config_of(3), Sizes(300), [3, 1]
    check_trainable(config, shape, Layout(pipeline=2, data=2, zero=0), layers)
    check_trainable(config, shape, Layout(pipeline=2, zero=1), layers)
    mixed = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"mixout": 0.1})})
    with pytest.raises(
        UserError, match=r"optimizer.mixout: there are no trained weights[^$]*ZeRO-3[^$]*set parallel.zero: 2"
    ):
        check_trainable(mixed, shape, Layout(data=2, zero=3), [4])
    with pytest.raises(UserError, match=r"stage 1 of 2 has no weight that learns.*set parallel.zero: 0"):
        check_trainable(config, shape, Layout(pipeline=2, data=2, zero=1), layers)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("model.lora={}", "model.initial=null"), "model.lora: adapts a trained model, and there is none"),
        (("model.lora={targets: []}",), "model.lora.targets: is empty"),
        (("model.lora={targets: [key]}",), "model.lora.targets"),
        (("model.lora={}", "model.reset=1"), "model.reset: begins layers at random weights, which lora leaves"),
        ((MIXOUT, "model.lora={}"), "optimizer.mixout: has no effect with model.lora"),
        (("optimizer.freeze=-1",), "optimizer.freeze: -1 layers; give 0 or more, or a list of names"),
        (("optimizer.freeze=[block.0]",), "did you mean blocks.0"),
        (
            ("optimizer.freeze=[pooler, blocks.1]", "model.reset=1"),
            "optimizer.freeze: blocks.1.attention.k.bias would begin at random",
        ),
    ],
)
def test_what_cannot_be_is_refused(fields: tuple[str, ...], words: str, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny.write_config(tmp_path, "classification", tiny.bert(tiny_data), train=16)
    running.assert_refused(running.command("train", config, *fields), words)
