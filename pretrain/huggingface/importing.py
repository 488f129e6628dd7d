"""`python -m pretrain import`: a folder of Hugging Face's as a run of ours, at step 0.

    RUN/config.yaml, tokenizer.*, checkpoints/step-00000000/

Such a run evaluates, generates and exports as any other. It has no optimizer's state, and nothing says what data it saw.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from parallel.layers import Parts
from parallel.logical import logical_tensors
from pretrain.config.load import checked_config, dump_config
from pretrain.config.run import Config
from pretrain.data.folder import whole_folder
from pretrain.errors import UserError
from pretrain.huggingface import vocabulary
from pretrain.huggingface.architecture import Architecture, Inexpressible, Row, Settings
from pretrain.huggingface.architectures import read_architecture
from pretrain.huggingface.forms import Shape, joined_shape, take
from pretrain.huggingface.progress import Bar
from pretrain.huggingface.tensors import Planned, Weights, parts_of, read_limited, write_file
from pretrain.models.make import make_model
from pretrain.opening import State, folder_of, open_checkpoint
from pretrain.runs import CHECKPOINTS, CONFIG, keep_tokenizer
from pretrain.saving import write_manifest
from pretrain.sizes import Sizes
from pretrain.storage import Entry, Written, file_name
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import FILES, load_tokenizer
from pretrain.tokenization.library import parse_json


def import_folder(folder: Path, run: Path, tokenizer: Path | None = None, say: Callable[[str], None] = print) -> Config:
    """Make `run` of the folder. tokenizer: a path of another one than the folder's. Raises UserError, and leaves `run` as
    it was, where we cannot express the model, or the folder does not hold all of it."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json in it, so this is no model's folder of Hugging Face's")
    architecture, settings = read_architecture(parse_json(read_limited(path), str(path)), str(path))
    found = vocabulary.read_tokenizer(folder) if tokenizer is None else load_tokenizer(tokenizer)
    config = _config(settings, found, run, path)
    with Weights(folder) as weights:
        planned = plan(architecture, config, settings["vocab_size"], weights)
        config = _with_heads(config, {tensor.name for tensor in planned})
        with whole_folder(run, (CONFIG, CHECKPOINTS, *FILES), say) as draft:
            (draft / CONFIG).write_text(dump_config(config))
            keep_tokenizer(draft, found)
            _write_checkpoint(draft, planned, architecture.model_type)
            open_checkpoint(folder_of(draft, 0))  # what was written is what will be accepted
    return config


def _config(settings: Settings, tokenizer: Tokenizer, run: Path, path: Path) -> Config:
    """The config of the run. Raises UserError where the values are none that a model can have."""
    size = settings["vocab_size"]
    if type(size) is not int or tokenizer.vocab_size > size:
        raise UserError(
            f"{path}: vocab_size is {size!r:.40}, but the tokenizer has {tokenizer.vocab_size:,} ids: these are not of one model."
        )
    model = {**settings, "vocab_size": None if size == tokenizer.vocab_size else size}
    values: dict[str, object] = {
        "model": model,
        "data": {"seq_length": settings["max_positions"]},
        "run": {"dir": str(run)},
    }
    values["precision"] = {"compute": "fp32"}
    values["objective"] = {"kind": "causal" if settings["kind"] == "gpt" else "masked"}
    return checked_config(values, f"{path}: this model cannot be one of ours")


def _with_heads(config: Config, names: set[str]) -> Config:
    """An encoder's objective is that whose heads are there."""
    if config.model.causal:
        return config
    pairs = "next" if "pair_head.weight" in names else "none"
    objective = config.objective.model_copy(update={"pairs": pairs})
    return config.model_copy(update={"objective": objective})


def plan(architecture: Architecture, config: Config, vocab_size: int, weights: Weights) -> list[Planned]:
    """Our tensors, each taken out of theirs when its turn comes. Raises UserError where the folder's tensors are not just
    those of the model."""
    shapes = _shapes(config, vocab_size)
    try:
        rows = architecture.rows_of(config.model.num_layers, set(shapes))
    except Inexpressible as reason:
        raise UserError(f"{weights.folder}: {reason}") from reason
    names = architecture.names_in(weights.names, [row.theirs for row in rows], tied=config.model.tie_embeddings)
    planned = []
    for row in rows:
        parts = [shapes[name] for name in row.ours]
        if row.theirs not in names and all(name.startswith(architecture.optional) for name in row.ours):
            continue
        if row.theirs not in names:
            raise UserError(f"{weights.folder}: lacks the tensor {row.theirs}.")
        stored = names.pop(row.theirs)
        if weights.shape(stored) != joined_shape(row, parts):
            raise UserError(
                f"{weights.folder}: {stored} is {weights.shape(stored)}, but by config.json {joined_shape(row, parts)}."
            )
        planned += [_taken(row, name, stored, parts, weights, config.model.num_heads) for name in row.ours]
    if names:
        raise UserError(f"{weights.folder}: holds {min(names.values())}, which this model has no place for.")
    return planned


def _taken(row: Row, name: str, stored: str, parts: list[Shape], weights: Weights, heads: int) -> Planned:
    return Planned(name, parts[row.ours.index(name)], lambda: take(row, name, weights.read(stored), parts, heads))


def _shapes(config: Config, vocab_size: int) -> dict[str, Shape]:
    """Of our logical tensors."""
    with torch.device("meta"):
        objective = config.objective if config.model.causal else config.objective.model_copy(update={"pairs": "next"})
        model = make_model(config.model_copy(update={"objective": objective}), Parts(), Sizes(vocab_size))
    return {name: piece.shape for name, piece, _ in logical_tensors(model)}


def _write_checkpoint(run: Path, planned: list[Planned], kind: str) -> None:
    """The checkpoint of step 0: weights alone."""
    folder = folder_of(run, 0)
    folder.mkdir(parents=True)
    written = Written([], {})
    with Bar("Importing", sum(tensor.numel for tensor in planned) * torch.float32.itemsize) as bar:
        for number, part in enumerate(parts_of(planned, torch.float32.itemsize)):
            name = file_name(0, number)
            written.files[name] = write_file(folder / name, part, torch.float32, bar.add, {"format": "pt"})
            for tensor in part:
                whole = Entry(tensor.name, tensor.shape, (0,) * len(tensor.shape), tensor.shape, name)
                written.entries.append(whole)
    write_manifest(folder, State(), {"layout": "imported", "processes": 1, "imported": kind}, [written])


def main(args: Namespace) -> int:
    """`python -m pretrain import`."""
    run = Path(args.out)
    tokenizer = None if args.tokenizer is None else Path(args.tokenizer)
    config = import_folder(Path(args.folder), run, tokenizer, lambda line: print(line, file=sys.stderr))
    print(f"{run}: {config.model.kind} of {config.model.num_layers} layers, {config.model.hidden_size} wide")
    if config.model.causal:
        print(f"next: python -m pretrain generate {run} --prompt TEXT")
    else:
        print(
            f"next: python -m pretrain train configs/finetune/classification.yaml model.initial={run} data.train=FILE"
        )
    return 0
