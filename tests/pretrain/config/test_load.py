"""Loading a configuration: nothing unknown, nothing converted, nothing lost, and all that is wrong told at once."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pretrain.config import yaml
from pretrain.config.duration import Span
from pretrain.config.load import check_layout, dump_config, help_config, load_config
from pretrain.config.run import Config
from pretrain.errors import UserError
from tests.distributed import REPOSITORY


def load(text: str, *overrides: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text)
        return load_config(path, overrides)


def refusal(text: str, *overrides: str) -> list[str]:
    """The lines after the title of the one message that refuses this."""
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    title, *lines = str(caught.value).splitlines()
    assert title.endswith("config.yaml: this configuration cannot be used:")
    assert not re.search(r"pydantic|Input should|type=|Traceback|Value error", str(caught.value))
    return lines


def fields(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of the configuration and its description; of sections, their docstring."""
    for name, field in section.model_fields.items():
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        parts = [part for part in inner if issubclass(part, BaseModel)]
        yield f"{path}{name}", field.description or (parts[0].__doc__ if parts else None)
        for part in parts:
            yield from fields(part, f"{path}{name}.")


# -- what a field is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "words"), fields(Config))
def test_every_field_has_a_meaning_in_one_line(path: str, words: str | None) -> None:
    assert words and words.strip() and "\n" not in words.split("\n\n")[0].strip()


def test_help_shows_every_field_and_is_yaml_of_the_defaults() -> None:
    assert load(help_config()) == Config()
    shown = yaml.parse(help_config())
    leaves = {f"{section}.{key}" for section, part in shown.items() if isinstance(part, dict) for key in part}
    for section, part in (("objective", "template"), ("data", "cache"), ("data", "remote")):
        leaves |= {f"{section}.{part}.{name}" for name in shown[section][part]}
    nested = ("model.rope_scaling.", "model.lora.", "batch.ramp.", "data.phases.")  # null by default: shown as comments
    for path, _ in fields(Config):
        if path.startswith(nested):
            assert re.search(rf"^  #   {path.rsplit('.')[-1]}: ", help_config(), re.MULTILINE)
        else:
            assert path in leaves | set(shown)


def test_an_empty_mapping_is_the_defaults() -> None:
    assert load("{}") == load("version: 1") == Config()


# -- there and back --------------------------------------------------------------------------------------------------

SPANS = st.builds(Span, st.integers(1, 10**15), st.sampled_from(["steps", "tokens"]))
RATES = st.floats(0, 1, exclude_min=True, exclude_max=True)
CHOICES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {
        "num_layers": st.integers(1, 200),
        "hidden_size": st.integers(1, 50).map(lambda n: 12 * n),
        "activation": st.sampled_from(["gelu", "swiglu"]),
        "dropout": RATES,
        "attention_window": st.none() | st.integers(1, 99) | st.lists(st.none() | st.integers(1, 99), min_size=1),
        "tie_embeddings": st.booleans(),
    },
    "data": {"train": st.text(max_size=20) | st.lists(st.text(max_size=20), min_size=1, max_size=3)},
    "batch": {
        "ramp": st.none()
        | st.builds(lambda span: {"start": 4, "increment": 4, "length": str(span)}, SPANS)
    },
    "optimizer": {"learning_rate": st.floats(5e-324, 1e300), "betas": st.tuples(RATES, RATES).map(list)},
    "schedule": {"warmup": SPANS.map(str), "total": SPANS.map(str), "decay": st.none() | SPANS.map(str)},
    "monitor": {"sample_prompt": st.text(max_size=30), "sample_every": st.none() | SPANS.map(str)},
    "run": {"dir": st.text(max_size=30), "seed": st.integers(0, 2**63 - 1)},
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({name: st.fixed_dictionaries({}, optional=part) for name, part in CHOICES.items()}))
def test_a_dumped_config_is_loaded_the_same(values: dict[str, Any]) -> None:
    config = Config.model_validate(values)
    again = load(dump_config(config))
    assert again == config and dump_config(again) == dump_config(config)


# -- unknown keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("modle: {}", "modle: unknown key; did you mean model?"),
        ("model: {num_layer: 2}", "model.num_layer: unknown key; did you mean model.num_layers?"),
        ("model: {n_layers: 2}", "model.n_layers: unknown key; did you mean model.num_layers?"),
        ("optimizer: {learning_rte: 1}", "optimizer.learning_rte: unknown key; did you mean optimizer.learning_rate?"),
        ("learning_rate: 1", "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("seed: 1", "seed: unknown key; did you mean data.seed or run.seed?"),
        ("model: {seq_length: 2}", "model.seq_length: unknown key; did you mean data.seq_length?"),
        ("optimizer: {warmup: 1 steps}", "optimizer.warmup: unknown key; did you mean schedule.warmup?"),
        ("model: {window: 2}", "model.window: unknown key; did you mean model.attention_window or data.window?"),
        ("batch: {ramp: {strat: 1, increment: 3, length: 4 steps, start: 1}}",
         "batch.ramp.strat: unknown key; did you mean batch.ramp.start?"),
        ("data: {phases: [{seq_len: 8, seq_length: 8, length: 4 steps}]}",
         "data.phases.0.seq_len: unknown key; did you mean data.phases.0.seq_length?"),
        ("model: {rope_scaling: {facto: 2}, positions: rope}",
         "model.rope_scaling.facto: unknown key; did you mean model.rope_scaling.factor?"),
        ("run: {xyzzy: 1}",
             "run.xyzzy: unknown key; there are: dir, seed, stop_at, on_spike, spike_factor, max_rewinds, max_bad_steps"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_or_the_section_that_has_it(text: str, line: str) -> None:
    assert refusal(text) == [f"  {line}"]


def test_an_unknown_key_in_an_override_is_refused_in_the_same_words() -> None:
    assert refusal("{}", "model.n_layers=2") == refusal("model: {n_layers: 2}")


# -- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("batch.size='8'", "batch.size: must be a whole number, found '8'"),
        ("batch.size=8.0", "batch.size: must be a whole number, found 8.0"),
        ("batch.size=true", "batch.size: must be a whole number, found True"),
        ("batch.size=0", "batch.size: must be greater than or equal to 1, found 0"),
        ("batch.size=", "batch.size: must be a whole number, found None"),
        ("optimizer.learning_rate='1e-3'", "optimizer.learning_rate: must be a number, found '1e-3'"),
        ("optimizer.learning_rate=true", "optimizer.learning_rate: must be a number, found True"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: must be a finite number, found inf"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: must be a finite number, found nan"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: must be greater than 0, found 0"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected two numbers such as [0.9, 0.95], found [0.9]"),
        ("optimizer.betas=0.9", "optimizer.betas: expected two numbers such as [0.9, 0.95], found 0.9"),
        ("optimizer.betas=[0.9, x]", "optimizer.betas: must be a number, found 'x'"),
        ("model.tie_embeddings=1", "model.tie_embeddings: must be true or false, found 1"),
        ("model.tie_embeddings=yes", "model.tie_embeddings: must be true or false, found 'yes'"),
        ("model.norm=batch", "model.norm: must be 'layer' or 'rms', found 'batch'"),
        ("model.attention_window=[8, x]", "model.attention_window: must be a whole number, found 'x'"),
        ("run.dir=7", "run.dir: must be a string, found 7"),
        ("run.dir=null", "run.dir: must be a string, found None"),
        ("data.train=[a, 7]", "data.train: must be a string, found 7"),
        ("schedule.total=200", 'schedule.total: expected a duration such as "200 steps" or "10M tokens", found 200'),
        ("schedule.total=0 steps", "schedule.total: must be at least 1 step or token, found 0 steps"),
        ("checkpoint.every=0 tokens", "checkpoint.every: must be at least 1 step or token, found 0 tokens"),
        ("monitor.log_every=1.5 steps", "monitor.log_every: '1.5 steps' is not a whole number of steps"),
        ("version=2", "version: must be 1, found 2"),
        ("model=7", "model: must be a section, {key: value, ...}, found 7; give it fields, or leave it out"),
        ("model=", "model: must be a section, {key: value, ...}, found None; give it fields, or leave it out"),
        ("batch.ramp={start: 8}", "batch.ramp.increment: is missing"),
    ],
)
def test_a_wrong_value_names_its_path_what_was_expected_and_what_was_found(override: str, line: str) -> None:
    lines = refusal("{}", override)
    assert lines[0].startswith(f"  {line}")
    assert ("; it is: " in lines[0]) == ("give it fields" not in lines[0])  # the field's meaning, once
    assert len(lines) == (2 if "ramp" in override else 1)


def test_a_whole_number_is_a_number() -> None:
    rate = load("optimizer: {learning_rate: 1}").optimizer.learning_rate
    assert rate == 1.0 and type(rate) is float


def test_numbers_with_exponents_are_numbers_and_words_are_words() -> None:
    config = load("optimizer: {learning_rate: 1e-3}\nrun: {dir: no}\nmonitor: {sample_prompt: 2024-01-01}")
    assert (config.optimizer.learning_rate, config.run.dir, config.monitor.sample_prompt) == (1e-3, "no", "2024-01-01")


# -- several mistakes ------------------------------------------------------------------------------------------------


def test_all_mistakes_of_a_file_and_of_the_overrides_are_told_at_once() -> None:
    text = """
    model: {num_heads: 5, num_kv_heads: 2, rope_scaling: {factor: 2}, attention_window: [], hidden_size: 33}
    data: {train: [], weights: [1, -1]}
    batch: {size: 12, micro_size: true, ramp: {start: 1}}
    optimizer: {clip_nrm: 1}
    schedule: {kind: constant, decay: 5 steps}
    checkpoint: {keep_last: 0, every: soon}
    size: 3
    """
    overrides = ["run.seed=-1", "a", "=4", "model.num_heads.x=2", "run.dir=[", "monitor.log_evry=1 steps"]
    lines = refusal(text, *overrides)
    found = [line.strip().partition(": ")[0] for line in lines]
    wanted = [
        "model.hidden_size", "model.num_kv_heads", "model.rope_scaling", "model.attention_window", "data.train",
        "data.weights", "data.weights", "batch.micro_size", "batch.ramp.increment", "batch.ramp.length",
        "optimizer.clip_nrm", "schedule.decay", "checkpoint.keep_last", "checkpoint.every", "size",
        "run.seed", "a", "=4", "model.num_heads.x", "run.dir=[", "monitor.log_evry",
    ]  # fmt: skip
    assert sorted(found) == sorted(wanted)
    assert all("; " in line for line in lines if not line.startswith("  run.dir=["))


def test_fields_that_do_not_go_together_are_told_at_once_with_the_mend() -> None:
    text = "monitor: {patience: 3}\nmodel: {max_positions: 128}\n"
    assert refusal(text) == [
        "  data.seq_length: 256 is longer than model.max_positions 128; lower it, or raise model.max_positions",
        "  monitor.patience: needs held-out data; set data.validation, or remove it",
        "  monitor.patience: counts validations; set monitor.validate_every",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {num_heads: 7}", "model.hidden_size: 384 is not a multiple of num_heads 7; give 6 heads"),
        ("model: {num_kv_heads: 4}", "model.num_kv_heads: num_heads 6 is not a multiple of 4; the nearest that works: 3"),
        ("model: {hidden_size: 6, positions: rope}", "model.positions: rope needs an even head size, found 1"),
        ("model: {hidden_size: 9, num_heads: 1, positions: sinusoidal}", "model.hidden_size: sinusoidal positions need"),
        ("model: {attention_window: 0}", "model.attention_window: 0 shows no tokens"),
        ("model: {positions: rope, rope_scaling: {kind: llama3, high_frequency_factor: 1}}",
         "model.rope_scaling.high_frequency_factor: 1.0 is not above low_frequency_factor 1.0"),
        ("data: {weights: [1, 1]}", "data.weights: 2 for 1 train folders"),
        ("batch: {size: 8, ramp: {start: 9, increment: 3, length: 4 steps}}", "batch.ramp.start: 9 is above batch.size 8"),
        ("batch: {size: 8, ramp: {start: 1, increment: 3, length: 4 steps}}",
         "batch.ramp.increment: from 1 by 3 never reaches batch.size 8; choose one that divides 7"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas: [0.9, 1.0]: each must be at least 0 and below 1"),
        ("data: {phases: [{seq_length: 512, length: 4 steps}]}",
         "data.phases.0.seq_length: 512 is longer than data.seq_length 256, which is to be the longest; lower it"),
        ("data: {phases: [{seq_length: 16, length: 2 epochs}]}", "data.phases.0.length: 2 epochs: a phase is not in epochs"),
        ("data: {phases: [{seq_length: 16, length: 2 steps}]}\nmodel: {kind: encoder-decoder}\nobjective: {kind: prefix}",
         "data.phases: an encoder-decoder's source and target have one length each for the whole run; remove it"),
        ("data: {phases: [{seq_length: 16, length: 2 steps}]}\nmodel: {initial: m}\nobjective: {kind: classification}",
         "data.phases: has no effect on labelled examples; remove it"),
        ("data: {phases: [{seq_length: 4, length: 2 steps}]}\nmodel: {kind: bert}\nobjective: {kind: masked}",
         "data.phases.0.seq_length: 4 leaves no room beside [CLS] and [SEP]; give at least 8"),
        ("data: {phases: [{seq_length: 8, length: 2 steps, batch_size: 4}]}\n"
         "batch: {ramp: {start: 4, increment: 4, length: 9 steps}}",
         "data.phases.0.batch_size: batch.ramp decides how many sequences a step has; remove it, or batch.ramp"),
        ("schedule: {kind: inverse-sqrt}", "schedule.warmup: inverse-sqrt falls from the end of the warm-up"),
        ("schedule: {kind: constant, decay: 3 steps}", "schedule.decay: has no effect with kind: constant; remove it"),
        ("monitor: {validate_every: 3 steps}", "monitor.validate_every: needs held-out data"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together_are_refused(text: str, line: str) -> None:
    (found,) = refusal(text)
    assert found.startswith(f"  {line}") and "; " in found


# -- overrides -------------------------------------------------------------------------------------------------------


def test_an_override_wins_over_the_file_and_the_last_over_the_first() -> None:
    config = load("batch: {size: 8}\nrun: {seed: 3}", "batch.size=16", "batch.size=32", "data.train=[a, b]")
    assert (config.batch.size, config.run.seed, config.data.train_folders) == (32, 3, ["a", "b"])


def test_an_override_reaches_into_sections_that_are_null_or_missing() -> None:
    ramp = [f"batch.ramp.{part}" for part in ("start=4", "increment=4", "length=9 steps")]
    for text in ("{}", "batch:", "batch: {ramp: null}", "batch: {ramp: {start: 1}}"):
        found = load(text, *ramp).batch.ramp
        assert found is not None and (found.start, found.increment, str(found.length)) == (4, 4, "9 steps")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("a", "a: not of the form section.key=value; write for example optimizer.learning_rate=3e-4"),
        ("", ": not of the form section.key=value; write for example optimizer.learning_rate=3e-4"),
        ("=3", "=3: not of the form section.key=value; write for example optimizer.learning_rate=3e-4"),
        ("run.=3", "run.=3: not of the form section.key=value; write for example optimizer.learning_rate=3e-4"),
        (".seed=3", ".seed=3: not of the form section.key=value; write for example optimizer.learning_rate=3e-4"),
        ("run..seed=3", "run..seed=3: not of the form section.key=value; write for example optimizer.learning_rate=3e-4"),
        ("run.seed=[1", "run.seed=[1: the value is not valid YAML: line 1: expected ',' or ']', but got '<stream end>'"),
        ("run.dir=a: b: c", "run.dir=a: b: c: the value is not valid YAML: line 1: mapping values are not allowed here"),
        ("run.seed.x=3", "run.seed.x: run.seed is 4, no section; give that a value, or name a field of a section"),
        ("run.seed.x.y=3", "run.seed.x.y: run.seed is 4, no section; give that a value, or name a field of a section"),
        ("data.train.0=a", "data.train.0: data.train is ['a'], no section; give that a value, or name a field of a section"),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_applied_is_refused(override: str, line: str) -> None:
    assert refusal("run: {seed: 4}\ndata: {train: [a]}", override) == [f"  {line}"]


def test_an_override_does_not_hide_that_its_section_is_wrong_in_the_file() -> None:
    assert refusal("run: 4", "run.seed=3") == [
        "  run.seed: run is 4, no section; give that a value, or name a field of a section",
        "  run: must be a section, {key: value, ...}, found 4; give it fields, or leave it out",
    ]


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_missing_file_lists_the_ready_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match=r"no\.yaml: there is no such file; ready ones: configs/") as caught:
        load_config("no.yaml")
    ready = str(caught.value).partition("ready ones: ")[2].split(", ")
    assert sorted(ready) == sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("configs/*/*.yaml"))
    monkeypatch.chdir(tmp_path)  # where there are none
    with pytest.raises(UserError, match=r"no\.yaml: there is no such file$"):
        load_config("no.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a configuration is a mapping of sections"),
        (b"- model\n", "a configuration is a mapping of sections"),
        (b"just text", "a configuration is a mapping of sections"),
        (b"model: {\n", "not valid YAML: line 2: "),
        (b"model: {}\nmodel: {}\n", "not valid YAML: line 2: the key 'model' stands twice"),
        (b"run: {dir: \xff\xfe}\n", "cannot be read as a configuration"),
        (b"\x1f\x8b\x08\x00binary", "cannot be read as a configuration"),
        (b"# " + b"long " * 20000, "not valid YAML: larger than 64 KiB"),
        (b"run: {dir: !!python/object/apply:os.getcwd []}\n", "not valid YAML: line 1: .* is a tag"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"c.yaml: {words}") as caught:
        load_config(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_what_is_no_file_is_refused_without_reading_it_all(path: str) -> None:
    with pytest.raises(UserError, match=f"^{path}: "):
        load_config(path)


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_every_batch_size_of_a_ramp_is_checked_against_the_processes() -> None:
    config = load("batch: {size: 16, micro_size: 2, ramp: {start: 4, increment: 4, length: 9 steps}}")
    check_layout(config, 2)
    with pytest.raises(UserError) as caught:
        check_layout(config, 4)  # 4 and 12 sequences give a rank 1 and 3, which 2 does not divide
    [line] = str(caught.value).splitlines()[1:]
    assert line.startswith("  batch.ramp: 4 sequences, one of its sizes, are no multiple of 4 data-parallel ranks")
    assert line.endswith("make start and increment multiples of 8")


def test_every_phase_is_checked_against_the_processes() -> None:
    phase = "{seq_length: 66, length: 9 steps, batch_size: 24, micro_size: 3}"
    config = load(f"data: {{phases: [{phase}]}}\nbatch: {{size: 16, micro_size: 2}}\nparallel: {{context: 2}}")
    check_layout(config, 4)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"context": 3})})
    with pytest.raises(UserError) as caught:
        check_layout(config, 15)  # 256 is no multiple of 3; 16 and 24 are none of 5 ranks
    lines = [line.strip().partition("; ")[0] for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "parallel.context: 3 does not divide data.seq_length 256",
        "batch.size: 16 sequences cannot be shared by 5 data-parallel ranks",
        "data.phases.0: batch.size: 24 sequences cannot be shared by 5 data-parallel ranks",
    ]
    with pytest.raises(UserError, match=r"data\.phases\.0: parallel\.context: 4 does not divide data\.seq_length 66"):
        check_layout(config.model_copy(update={"parallel": config.parallel.model_copy(update={"context": 4})}), 4)


def test_all_that_is_wrong_with_a_layout_is_told_at_once() -> None:
    config = load("parallel: {tensor: 4, pipeline: 7, context: 5, zero: 3}")
    with pytest.raises(UserError) as caught:
        check_layout(config, 3)
    paths = [line.strip().partition(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert set(paths) == {"parallel.context", "parallel.zero", "parallel.tensor", "parallel.pipeline", "parallel"}
    assert math.prod("; " in line for line in str(caught.value).splitlines()[1:])
