"""`model.initial`: the shape and tokenizer that a run takes from another, or from a folder of Hugging Face's. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.layout import Problem
from pretrain.config.load import checked_config, problem_error
from pretrain.config.model import ModelConfig
from pretrain.config.run import Config
from pretrain.errors import UserError

OWN = ("initial", "reset", "lora")
# What may be another than the initial model's: it changes the training, not what its weights mean.
FREE = (*OWN, "dropout", "embedding_dropout", "residual_dropout", "attention_dropout", "initial_scale")


def is_foreign(folder: str | Path) -> bool:
    """Whether it is a model's folder of Hugging Face's."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / "config.yaml").is_file()


def with_initial(config: Config, saved: Config | None = None) -> Config:
    """The config with the shape of its initial model. saved: of the same run, begun before, from which the shape is taken.

    Raises UserError where the config asks for another shape."""
    initial = config.model.initial
    if initial is None:
        return config
    if saved is not None and saved.model.initial == initial:
        theirs = saved.model.model_dump(mode="json")
    else:
        theirs = _foreign_shape(Path(initial)) if is_foreign(initial) else _shape_of_run(Path(initial))
    wished = {name: getattr(config.model, name) for name in config.model.model_fields_set}
    if problems := list(_differences(wished, theirs, initial)):
        raise problem_error("this run cannot start", problems)
    kept = config.model.model_dump(mode="json", include=set(wished) & set(FREE))
    if "dropout" in kept:  # whose rates of their own, as of the model that it starts from, are gone with it
        kept = {name: None for name in FREE if name.endswith("_dropout")} | kept
    values = {**config.model_dump(mode="json"), "model": {**theirs, **kept}}
    return checked_config(values, f"{initial}: this run cannot start from it")


def initial_tokenizer(initial: str) -> Any:
    """The tokenizer of `model.initial`."""
    from pretrain.huggingface.vocabulary import read_tokenizer
    from pretrain.runs import run_tokenizer

    return read_tokenizer(Path(initial)) if is_foreign(initial) else run_tokenizer(Path(initial))


def _differences(wished: dict[str, Any], theirs: dict[str, Any], initial: str) -> Iterator[Problem]:
    full = ModelConfig.model_validate({name: value for name, value in theirs.items() if name not in OWN})
    for name, value in wished.items():
        found = getattr(full, name)
        if name not in FREE and value != found:
            yield Problem(f"model.{name}", f"{value!r}, but {initial} has {found!r}", "remove it")


def _shape_of_run(run: Path) -> dict[str, Any]:
    from pretrain.runs import run_config, run_tokenizer
    from pretrain.vocabulary import vocabulary_of

    config = run_config(run)
    longest = max(config.model.max_positions or 0, *(length for _, length in config.lengths))
    own = {"max_positions": longest, "initial": None, "reset": 0, "lora": None}
    if config.objective.kind == "span-corruption":  # the rows of its sentinels are kept under any other objective
        own["vocab_size"] = vocabulary_of(config, run_tokenizer(run)).size
    return {**config.model.model_dump(mode="json"), **own}


def _foreign_shape(folder: Path) -> dict[str, Any]:
    from pretrain.huggingface.architectures import read_architecture
    from pretrain.huggingface.tensors import read_limited
    from pretrain.tokenization.library import parse_json

    path = folder / "config.json"
    settings = read_architecture(parse_json(read_limited(path), str(path)), str(path)).settings
    try:
        return ModelConfig.model_validate(settings).model_dump(mode="json")
    except ValueError as error:
        raise UserError(f"{path}: this model cannot be one of ours: {error}") from error
