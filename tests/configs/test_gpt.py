"""The shipped GPT configurations: GPT-3's against its paper's table, and all of them against their named layouts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from parallel.layout import Layout
from pretrain.config import yaml
from pretrain.config.load import check_layout, load_config
from pretrain.config.model import parameter_count
from pretrain.schedule import Plan
from tests.distributed import REPOSITORY

FOLDER = REPOSITORY / "configs"
SHIPPED = sorted(path for path in FOLDER.glob("*/*.yaml") if path.parent.name not in ("finetune", "selection"))
START = re.compile(r"^# Start with (\d+) processes? \((\d+) nodes? of 8 GPUs\): (.+)\.$", re.MULTILINE)
VOCAB, LENGTH = 50257, 2048


class Row(NamedTuple):
    """A row of Table 2.1 (Brown et al. 2020), as printed."""

    params: float
    layers: int
    width: int
    heads: int
    head: int
    batch: float
    rate: float


TABLE = {
    "small": Row(125e6, 12, 768, 12, 64, 0.5e6, 6.0e-4),
    "medium": Row(350e6, 24, 1024, 16, 64, 0.5e6, 3.0e-4),
    "large": Row(760e6, 24, 1536, 16, 96, 0.5e6, 2.5e-4),
    "xl": Row(1.3e9, 24, 2048, 24, 128, 1e6, 2.0e-4),
    "2.7b": Row(2.7e9, 32, 2560, 32, 80, 1e6, 1.6e-4),
    "6.7b": Row(6.7e9, 32, 4096, 32, 128, 2e6, 1.2e-4),
    "13b": Row(13.0e9, 40, 5140, 40, 128, 2e6, 1.0e-4),
    "175b": Row(175.0e9, 96, 12288, 96, 128, 3.2e6, 0.6e-4),
}
# Where heads x head size is not the width, the table cannot be right as printed: what is taken instead.
MENDED = {"xl": TABLE["xl"]._replace(heads=16), "13b": TABLE["13b"]._replace(width=5120)}
ROWS = [pytest.param(name, MENDED.get(name, row), id=name) for name, row in TABLE.items()]


def text_of(name: str) -> str:
    return (FOLDER / f"gpt/gpt3-{name}.yaml").read_text()


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_gpt3_config_has_its_rows_shape_and_rate(name: str, row: Row) -> None:
    config = load_config(FOLDER / f"gpt/gpt3-{name}.yaml")
    model = config.model
    assert row.heads * row.head == row.width
    assert (model.num_layers, model.hidden_size, model.num_heads, model.size_of_head) == row[1:5]
    assert model.kv_heads == row.heads and model.feed_forward_size == 4 * row.width  # "d_ff = 4 * d_model"
    assert config.optimizer.learning_rate == row.rate
    assert config.data.seq_length == LENGTH and model.vocab_size == VOCAB


def test_only_rows_that_contradict_themselves_are_mended_and_their_files_say_so() -> None:
    assert {name for name, row in TABLE.items() if row.heads * row.head != row.width} == set(MENDED)
    assert "the table has 24" in text_of("xl") and "the table has d_model 5,140" in text_of("13b")


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_gpt3_config_has_the_papers_number_of_parameters(name: str, row: Row) -> None:
    """By a count of its own: a layer has 12 H^2 weights in matrices and 13 H in biases and norms; then the two
    embeddings and the last norm. All within 2% of the table: the largest differences are 2.7B (2.65B) and 350M (355.9M)."""
    H = row.width
    counted = row.layers * (12 * H * H + 13 * H) + (VOCAB + LENGTH) * H + 2 * H
    assert abs(counted / row.params - 1) < 0.02
    assert parameter_count(load_config(FOLDER / f"gpt/gpt3-{name}.yaml").model, VOCAB, LENGTH) == counted


def test_gpt3_mediums_file_says_that_the_table_rounds() -> None:
    config = load_config(FOLDER / "gpt/gpt3-medium.yaml")
    assert round(parameter_count(config.model, VOCAB, LENGTH) / 1e6, 1) == 355.9
    assert "355.9M parameters" in text_of("medium")


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_gpt3_config_trains_as_appendix_b_says(name: str, row: Row) -> None:
    config = load_config(FOLDER / f"gpt/gpt3-{name}.yaml")
    optimizer, schedule, ramp = config.optimizer, config.schedule, config.batch.ramp
    assert (optimizer.betas, optimizer.epsilon) == ((0.9, 0.95), 1e-8)
    assert (optimizer.clip_norm, optimizer.weight_decay) == (1.0, 0.1)
    assert (schedule.kind, schedule.final_fraction) == ("cosine", 0.1)
    assert [str(span) for span in (schedule.warmup, schedule.decay, schedule.total)] == [
        "375M tokens", "260B tokens", "300B tokens",
    ]  # fmt: skip
    assert ramp is not None and ramp.start * LENGTH == 32 * 1024  # "32k tokens"
    assert ramp.length.unit == "tokens" and 4e9 <= ramp.length.count <= 12e9  # "over the first 4-12 billion tokens"
    assert abs(config.batch.size * LENGTH / row.batch - 1) < 0.05
    power = math.log2(config.batch.size)
    assert power == int(power) or name == "175b"


@pytest.mark.parametrize("name", TABLE)
def test_a_gpt3_config_is_the_papers_architecture(name: str) -> None:
    model = load_config(FOLDER / f"gpt/gpt3-{name}.yaml").model
    assert (model.kind, model.activation, model.norm, model.norm_position) == ("gpt", "gelu-tanh", "layer", "pre")
    assert model.positions == "learned" and model.biases and model.tie_embeddings
    assert [model.window(layer) for layer in range(4)] == [
        None,
        256,
        None,
        256,
    ]  # "alternating dense and locally banded"
    assert model.num_layers % 2 == 0 and "leaves open the band's width" in text_of(name)
    assert model.dropout == model.embedding_dropout_rate == model.attention_dropout_rate == 0.0


def test_larger_models_ramp_no_shorter_and_learn_no_faster() -> None:
    configs = [load_config(FOLDER / f"gpt/gpt3-{name}.yaml") for name in TABLE]
    lengths = [config.batch.ramp.length.count for config in configs if config.batch.ramp]
    assert lengths == sorted(lengths) and len(lengths) == len(TABLE)
    rates = [config.optimizer.learning_rate for config in configs]
    assert rates == sorted(rates, reverse=True)


# -- all of them -----------------------------------------------------------------------------------------------------


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(FOLDER)) for path in paths]


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_a_shipped_config_loads_and_fits_the_processes_that_it_names(path: Path) -> None:
    config = load_config(path)  # refuses unknown keys
    named = START.search(path.read_text())
    world = int(named[1]) if named else 1
    check_layout(config, world)
    if named:
        assert int(named[2]) * 8 == world
        assert str(Layout.of(config.parallel, world)) == named[3]
        assert config.parallel.tensor <= 8  # tensor parallelism stays within a node
    else:
        assert path.name == "demo.yaml", "a config names the processes to start with"


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_a_shipped_config_writes_to_a_folder_of_its_own_and_shows_all_its_sections(path: Path) -> None:
    config = load_config(path)
    assert config.run.dir == f"runs/{path.stem if path.parent.name == 'gpt' else f'{path.parent.name}-{path.stem}'}"
    written = yaml.parse(path.read_text())
    assert set(written) == set(type(config).model_fields), "a reader sees every section"


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_a_shipped_config_saves_and_validates_in_measure(path: Path) -> None:
    config = load_config(path)
    plan = Plan(config)
    assert plan.steps(config.schedule.warmup) < plan.total_steps
    assert plan.steps(config.checkpoint.every) <= plan.total_steps // 2
    every, samples = config.monitor.validate_every, config.monitor.validation_samples
    assert every is not None and samples is not None
    trained = plan.samples_before(plan.steps(every))
    assert samples / 3 <= 0.05 * trained, "validation, a third of a step's work, costs more than a twentieth of the run"


def test_gpt2_small_is_124m() -> None:
    config = load_config(FOLDER / "gpt/gpt2-small.yaml")
    assert config.data.seq_length == 1024 and config.batch.size == 512
    assert parameter_count(config.model, VOCAB, 1024) == 124_439_808


def test_the_llama_style_model_has_its_parts_and_its_size() -> None:
    config = load_config(FOLDER / "gpt/llama-style-160m.yaml")
    model = config.model
    assert (model.positions, model.norm, model.activation, model.biases) == ("rope", "rms", "swiglu", False)
    assert model.num_heads // model.kv_heads == 3
    H, F, kv, V = 768, 2048, 4 * 64, 32000
    counted = 18 * (H * (H + 2 * kv) + H * H + 3 * H * F + 2 * H) + 2 * V * H + H
    assert parameter_count(model, V, 2048) == counted
    assert model.vocab_size == V and round(counted / 1e6) == 162
