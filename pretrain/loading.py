"""A trained model on one process, for the commands that use it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kernels.vector_math import settle
from parallel.grid import pick_device
from parallel.layers import Parts
from pretrain import checkpoint
from pretrain.build import DTYPES
from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.finetuning.opening import run_labels, task_of
from pretrain.finetuning.tasks import Task
from pretrain.models.make import Model, make_model
from pretrain.runs import run_config, run_tokenizer
from pretrain.sizes import Sizes
from pretrain.tokenization.base import Tokenizer
from pretrain.vocabulary import vocabulary_of


class Loaded(NamedTuple):
    config: Config
    model: Model
    tokenizer: Tokenizer
    step: int
    task: Task | None = None  # that it was fine-tuned for


def load_model(run: Path, step: int | None = None) -> Loaded:
    """The model of a run's newest whole checkpoint, or of one step's, with its tokenizer."""
    settle()
    config = run_config(run)
    tokenizer = run_tokenizer(run)
    found = find_checkpoint(run, step)
    vocabulary = vocabulary_of(config, tokenizer)
    task = task_of(config, tokenizer, vocabulary, run_labels(run)) if config.objective.is_task else None
    shape = Sizes(vocabulary.size) if task is None else Sizes(vocabulary.size, task.num_outputs, task.num_rows)
    if config.objective.kind == "masked" and "transform.dense.weight" not in checkpoint.weight_shapes(found):
        raise UserError(
            f"{run}: holds the body alone of an imported model, without heads that predict; fine-tune it: "
            f"python -m pretrain train configs/finetune/classification.yaml model.initial={run}"
        )
    model = make_model(config, Parts(), shape)
    checkpoint.load_weights(found, model)
    model.to(pick_device(), DTYPES[config.precision.compute]).eval()
    return Loaded(config, model, tokenizer, found.state.step, task)


def find_checkpoint(run: Path, step: int | None) -> checkpoint.Checkpoint:
    """The newest whole checkpoint of a run, or that of one step. Raises UserError where there is none."""
    if step is not None:
        steps = checkpoint.list_steps(run)
        if step not in steps:
            raise UserError(f"--checkpoint {step}: {run} has checkpoints of the steps {steps}")
        return checkpoint.open_checkpoint(checkpoint.folder_of(run, step))
    found = checkpoint.latest(run)
    if found is None:
        raise UserError(f"{run}: no checkpoint yet; train it first: python -m pretrain train {run}")
    return found
