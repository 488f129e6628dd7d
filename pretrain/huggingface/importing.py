"""`python -m pretrain import`: a folder of Hugging Face's as a run of ours, at step 0.

    RUN/config.yaml, tokenizer.*, checkpoints/step-00000000/, labels.json of a task's model

Such a run evaluates, generates, predicts and exports as any other; one of a body without heads is what `model.initial` of a
fine-tuning can be. It has no optimizer's state, and nothing says what data it saw.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from parallel.layers import Parts
from parallel.logical import logical_tensors
from pretrain.config.folder import CHECKPOINTS, CONFIG
from pretrain.config.load import checked_config, dump_config
from pretrain.config.objective import TASKS, ObjectiveConfig
from pretrain.config.run import Config
from pretrain.data.folder import whole_folder
from pretrain.errors import UserError
from pretrain.finetuning.opening import LABELS, keep_labels, task_of
from pretrain.huggingface import vocabulary
from pretrain.huggingface.architecture import Architecture, Inexpressible, Json
from pretrain.huggingface.architectures import Read, read_architecture
from pretrain.huggingface.forms import Shape, fixed_shape, fixed_values, joined_shape, take
from pretrain.huggingface.rows import Fixed, Row, names_of
from pretrain.huggingface.tensors import Planned, Weights, read_limited
from pretrain.models.make import make_model
from pretrain.runs import keep_tokenizer
from pretrain.sizes import Sizes
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import FILES, load_tokenizer
from pretrain.tokenization.library import parse_json
from pretrain.vocabulary import vocabulary_of
from pretrain.weights import write_weights


def import_folder(folder: Path, run: Path, tokenizer: Path | None = None, say: Callable[[str], None] = print) -> Config:
    """Make `run` of the folder. tokenizer: a path of another one than the folder's. Raises UserError, and leaves `run` as
    it was, where we cannot express the model, or the folder does not hold all of it."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json in it, so this is no model's folder of Hugging Face's")
    theirs = parse_json(read_limited(path), str(path))
    read = read_architecture(theirs, str(path))
    found = vocabulary.read_tokenizer(folder) if tokenizer is None else load_tokenizer(tokenizer)
    _check_ends(read.architecture, theirs, found, path)
    config = _config(read, found, run, path)
    with Weights(folder) as weights:
        planned = plan(read, _shapes(config, found, read), config, weights)
        config = _with_pairs(config, {tensor.name for tensor in planned})
        with whole_folder(run, (CONFIG, CHECKPOINTS, LABELS, *FILES), say) as draft:
            (draft / CONFIG).write_text(dump_config(config))
            keep_tokenizer(draft, found)
            if config.objective.is_task:
                (draft / LABELS).write_bytes(keep_labels(read.labels))
            write_weights(draft, planned, {"layout": "imported", "imported": read.model.name}, "Importing")
    return config


def _check_ends(architecture: Architecture, theirs: Json, tokenizer: Tokenizer, path: Path) -> None:
    """Raises UserError where a document's end is not what it is for every model of ours."""
    for name, default in architecture.ends:
        if (found := theirs.get(name, default)) != tokenizer.eos:
            raise UserError(
                f"{path}: {name} is {found!r:.40}, but in this program a target begins after the symbol that ends texts, and "
                f"ends with it: {tokenizer.eos} ({tokenizer.piece(tokenizer.eos)}) of the tokenizer. The model learned "
                "otherwise (Marian's own begin after the padding), so it would write other targets here."
            )


def _config(read: Read, tokenizer: Tokenizer, run: Path, path: Path) -> Config:
    """The config of the run. Raises UserError where the values are none that a model can have."""
    size, length = read.settings["vocab_size"], read.settings["max_positions"]
    if type(size) is not int or tokenizer.vocab_size > size:
        raise UserError(
            f"{path}: vocab_size is {size!r:.40}, but the tokenizer has {tokenizer.vocab_size:,} ids: these are not of one model."
        )
    model = {**read.settings, "vocab_size": None if size == tokenizer.vocab_size else size}
    objective: dict[str, object] = {"kind": read.kind}
    if read.kind in TASKS:
        model["initial"] = str(path.parent)
        length = min(vocabulary.longest(path.parent) or length, length)
        if read.kind in ("tagging", "question-answering"):
            objective["overlap"] = min(ObjectiveConfig().overlap, length // 2)
    elif model["kind"] == "encoder-decoder" and type(length) is int:
        length *= 2  # as many for the source as for the target
    values: dict[str, object] = {
        "model": model,
        "data": {"seq_length": length},
        "objective": objective,
        "precision": {"compute": "fp32"},
        "run": {"dir": str(run)},
    }
    return checked_config(values, f"{path}: this model cannot be one of ours")


def _with_pairs(config: Config, names: set[str]) -> Config:
    """With the objective whose heads are there."""
    if "pair_head.weight" not in names:
        return config
    return config.model_copy(update={"objective": config.objective.model_copy(update={"pairs": "next"})})


def plan(read: Read, shapes: dict[str, Shape], config: Config, weights: Weights) -> list[Planned]:
    """Our tensors, each taken out of theirs when its turn comes. shapes: of those that there may be. Raises UserError where
    the folder's tensors are not just those of the model."""
    try:
        rows = read.architecture.rows_of(read.model, read.settings, set(shapes))
    except Inexpressible as reason:
        raise UserError(f"{weights.folder}: {reason}") from reason
    theirs = [row.theirs for row in rows] + [fixed.theirs for fixed in read.model.fixed]
    names = read.architecture.names_in(read.model, weights.names, theirs, tied=config.model.tie_embeddings)
    without = _heads_without(read, rows, set(names))
    planned = []
    for row in rows:
        parts = [shapes[name] for name in row.ours]
        if row.ours[0].split(".")[0] in without:
            continue
        if row.theirs not in names:
            raise UserError(f"{weights.folder}: lacks the tensor {row.theirs}.")
        stored = names.pop(row.theirs)
        if weights.shape(stored) != joined_shape(row, parts):
            raise UserError(
                f"{weights.folder}: {stored} is {weights.shape(stored)}, but by config.json {joined_shape(row, parts)}."
            )
        planned += [_taken(row, name, stored, parts, weights, config.model.num_heads) for name in row.ours]
    for fixed in read.model.fixed:
        if fixed.theirs in names:
            _check_fixed(fixed, names.pop(fixed.theirs), read, weights)
    if names:
        raise UserError(f"{weights.folder}: holds {min(names.values())}, which this model has no place for.")
    return planned


def _heads_without(read: Read, rows: list[Row], held: set[str]) -> set[str]:
    """The heads that the class need not have, and of which the folder holds nothing."""
    may = {name.split(".")[0] for name in names_of(read.model.optional)}
    return may - {row.ours[0].split(".")[0] for row in rows if row.theirs in held}


def _taken(row: Row, name: str, stored: str, parts: list[Shape], weights: Weights, heads: int) -> Planned:
    return Planned(name, parts[row.ours.index(name)], lambda: take(row, name, weights.read(stored), parts, heads))


def _check_fixed(fixed: Fixed, stored: str, read: Read, weights: Weights) -> None:
    """Raises UserError where the tensor is not what every model of ours stands for."""
    shape = fixed_shape(fixed, read.settings)
    if weights.shape(stored) != shape:
        raise UserError(f"{weights.folder}: {stored} is {weights.shape(stored)}, but by config.json {shape}.")
    tolerance = 0.0 if fixed.values == "no bias" else 0.01  # a table may be rounded to half precision
    if not (weights.read(stored) - fixed_values(fixed, read.settings)).abs().max() <= tolerance:
        kinds = {"no bias": "other values than zero", "waves": "another table than that of sinusoidal positions"}
        raise UserError(f"{weights.folder}: {stored} holds {kinds[fixed.values]}, which no model here has.")


def _shapes(config: Config, tokenizer: Tokenizer, read: Read) -> dict[str, Shape]:
    """Of the logical tensors that a folder of the class may have."""
    words, sizes = vocabulary_of(config, tokenizer), Sizes(read.settings["vocab_size"])
    if config.objective.is_task:
        task = task_of(config, tokenizer, words, read.labels)
        sizes = Sizes(words.size, task.num_outputs, task.num_rows)
    elif config.model.kind == "bert":
        objective = config.objective.model_copy(update={"pairs": "next"})
        config = config.model_copy(update={"objective": objective})
    with torch.device("meta"):
        model = make_model(config, Parts(), sizes)
    mine = names_of((*read.model.rows, *read.model.optional))
    others = read.architecture.heads - mine
    return {name: piece.shape for name, piece, _ in logical_tensors(model) if name not in others}


def main(args: Namespace) -> int:
    """`python -m pretrain import`."""
    run = Path(args.out)
    tokenizer = None if args.tokenizer is None else Path(args.tokenizer)
    config = import_folder(Path(args.folder), run, tokenizer, lambda line: print(line, file=sys.stderr))
    print(f"{run}: {config.model.kind} of {config.model.num_layers} layers, {config.model.hidden_size} wide")
    print(f"next: python -m pretrain {_next(config, run)}")
    return 0


def _next(config: Config, run: Path) -> str:
    """The command that the run is for."""
    if config.objective.is_task or config.model.kind == "encoder-decoder":
        return f"predict {run} --input FILE --out FILE"
    if config.model.causal:
        return f"generate {run} --prompt TEXT"
    return f"train configs/finetune/classification.yaml model.initial={run} data.train=FILE data.validation=FILE"
