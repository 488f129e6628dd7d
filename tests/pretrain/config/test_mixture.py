"""Named sources in a configuration: both ways of writing one, and every mistake with its path and mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.load import dump_config, help_config, load_config
from pretrain.config.run import Config
from pretrain.errors import UserError

TWO = "web: {folder: shards/web, weight: 0.7}, code: {folder: shards/code, weight: 0.3, epochs: 4}"


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_named_sources_are_read_in_either_form_and_sorted_by_name(tmp_path: Path) -> None:
    config = load(
        tmp_path, f"data: {{train: {{{TWO}}}}}", "data.train.books.folder=shards/books", "data.train.books.weight=1"
    )
    assert config.data.named is not None
    assert list(config.data.named) == ["books", "code", "web"]
    assert config.data.train_folders == ["shards/books", "shards/code", "shards/web"]
    assert config.data.named["code"].epochs == 4


def test_a_folder_alone_is_a_source(tmp_path: Path) -> None:
    config = load(tmp_path, "data: {train: {web: shards/web, code: {folder: shards/code, validation: shards/held}}}")
    assert config.data.train_folders == ["shards/code", "shards/web"]
    assert config.data.held_out == {"code": "shards/held"} and config.data.has_validation
    assert config.monitor.validate_every is None
    load(tmp_path, "data: {train: {web: {folder: a, validation: b}}}\nmonitor: {validate_every: 3 steps}")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("2B", 2 * 10**9), ("2B tokens", 2 * 10**9), ("4096", 4096), ("1.5K", 1500), ("2e6", 2 * 10**6)],
)
def test_a_budget_is_written_with_or_without_its_unit(tmp_path: Path, text: str, tokens: int) -> None:
    config = load(tmp_path, f"data: {{train: {{web: a, code: {{folder: b, tokens: {text}}}}}}}")
    assert config.data.named is not None
    budget = config.data.named["code"].tokens
    assert budget is not None and (budget.count, budget.unit) == (tokens, "tokens")


def test_the_resolved_configuration_is_read_again_as_the_same(tmp_path: Path) -> None:
    text = f"data: {{train: {{{TWO}}}, curriculum: [{{from: 1M tokens, weights: {{web: 1, code: 0}}}}]}}"
    config = load(tmp_path, text)
    assert load(tmp_path, dump_config(config)) == config
    (change,) = config.data.curriculum
    assert (str(change.begin), change.weights) == ("1M tokens", {"web": 1, "code": 0})


def test_help_has_the_fields_of_a_source_and_of_a_change() -> None:
    lines = help_config().splitlines()
    for field in ("weight: null", "tokens: null", "epochs: null", "from: ...", "weights: ..."):
        assert any(line.startswith(f"  #   {field}") for line in lines), field


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("train: {web: {folder: a, wieght: 1}}", "data.train.web.wieght: unknown key; did you mean data.train.web.weight?"),
        ("train: {web: {folder: a, weight: x}}", "data.train.web.weight: must be a number, found 'x'; it is: its share"),
        ("train: {web: {folder: a, weight: -1}}", "data.train.web.weight: must be greater than or equal to 0"),
        ("train: {web: {folder: a, epochs: 0}}", "data.train.web.epochs: must be greater than 0"),
        ("train: {web: {weight: 1}}", "data.train.web.folder: is missing; it is: folder of its shards"),
        ("train: {web: {folder: a, tokens: 3 steps}}", "data.train.web.tokens: a budget is in tokens, found 3 steps"),
        ("train: {web: {folder: a, tokens: lots}}", "data.train.web.tokens: expected a duration such as"),
        ("train: {}", "data.train: is empty; name at least one folder of shards"),
        ("train: 3", "data.train: must be a folder, a list of folders, or {name: folder or section, ...}, found 3"),
        ("train: {a/b: c}", "data.train: 'a/b' is no name; use letters, digits, - and _"),
        ("train: {web: {folder: a, weight: 1}, code: b, math: c}",
         "data.train: a weight for web, but neither weight nor tokens for code, math; give every source a weight or tokens"),
        ("train: {web: {folder: a, weight: 1, tokens: 2B}}", "data.train: web: weight and tokens say the same; keep one"),
        ("train: {web: {folder: a, weight: 0}, code: {folder: b, weight: 0}}", "data.train: none is above 0; give at least"),
        ("train: {web: a, code: b}, weights: [1, 2]", "data.weights: named sources have their own; write data.train: {name:"),
        ("train: a, temperature: 2", "data.temperature: has no effect but on several sources without weights"),
        ("train: [a, b], weights: [1, 2], temperature: 2", "data.temperature: has no effect but on several sources"),
        ("train: {web: {folder: a, weight: 1}, code: {folder: b, weight: 2}}, temperature: 2", "data.temperature: has no"),
        ("train: [a, b], curriculum: [{from: 1 steps, weights: {a: 1}}]",
         "data.curriculum: changes the weights of named sources; name them"),
        ("train: {web: a, code: b}, curriculum: [{from: 1 steps, weights: {web: 1}}]",
         "data.curriculum.0.weights: no code; name every source; 0 leaves it out"),
        ("train: {web: a}, curriculum: [{from: 1 steps, weights: {web: 1, mth: 2}}]",
         "data.curriculum.0.weights: data.train has no mth; there are: web"),
        ("train: {web: a}, curriculum: [{from: 1 steps, weights: {web: 0}}]", "data.curriculum.0.weights: none is above 0"),
        ("train: {web: a}, curriculum: [{from: 1 steps, weights: {web: -1}}]", "data.curriculum.0.weights: of web below 0"),
        ("train: {web: a}, curriculum: [{from: 1 epochs, weights: {web: 1}}]",
         "data.curriculum.0.from: 1 epochs: weights do not change by epochs; give steps or tokens"),
        ("train: {web: a}, curriculum: [{from: 5 steps, weights: {web: 1}}, {from: 5 steps, weights: {web: 2}}]",
         "data.curriculum.1.from: 5 steps is not after 5 steps; sort them"),
        ("train: {web: a, code: {folder: b, tokens: 1M}}, curriculum: [{from: 5 steps, weights: {web: 1, code: 1}}]",
         "data.curriculum: code: tokens of the whole run leave no weights to change; give weights instead"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_once_with_its_path_and_the_mend(tmp_path: Path, data: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"data: {{{data}}}")
    _, *found = str(caught.value).splitlines()
    assert len(found) == 1 and found[0].strip().startswith(line), found


def test_labelled_examples_have_no_names(tmp_path: Path) -> None:
    text = "data: {train: {a: b}}\nmodel: {initial: m}\nobjective: {kind: classification}"
    with pytest.raises(UserError, match=r"data.train: is more than one; name one file of labelled examples"):
        load(tmp_path, text)
