"""What a run starts from that is not made of random numbers: the shape, tokenizer and weights of `model.initial`.

A folder of Hugging Face's is first made a run of ours, inside the new run's folder. Weights are found by their canonical
names, so any layout starts from any other's checkpoint; those of a head that the task does not have are left, one that the
initial model does not have begins at random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from parallel.adapters import FACTORS
from parallel.grid import Grid
from parallel.initial import initial_values
from parallel.logical import canonical, view
from pretrain import checkpoint
from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.finetuning.opening import run_labels
from pretrain.inherit import is_foreign
from pretrain.loading import find_checkpoint
from pretrain.merging import Merged
from pretrain.runs import IMPORTED, run_config
from pretrain.tasks.labels import LabelSet
from pretrain.trainable import layer_of

HEADS = ("task_head.", "pooler.", "transform.", "pair_head.", "head.")


class Start(NamedTuple):
    """values(path, parameter): float32 of a local parameter. told: for people, where they are from; empty: random, or of no
    more use. digest: SHA-256 of the files that they are from."""

    values: Callable[[str, nn.Parameter], Tensor]
    told: str
    digest: str = ""


def start_of(config: Config, grid: Grid, frozen: Collection[str] = (), labels: LabelSet | None = None) -> Start:
    """Where the weights begin. frozen: those that do not learn; labels: of the task that is to be learned. Collective;
    raises UserError on every rank where the initial model lacks some."""
    seed = config.run.seed
    if config.model.initial is None or config.model.reset == "all":
        return Start(lambda path, parameter: initial_values(path, parameter, seed), "")
    if checkpoint.list_steps(Path(config.run.dir)) and not config.optimizer.mixout:  # which is gone on from
        return Start(lambda path, parameter: initial_values(path, parameter, seed), "")
    run = _run(Path(config.model.initial), Path(config.run.dir), grid)
    found, first = Merged(find_checkpoint(run, None), run_config(run).model), _first_reset(config)
    # The head of another task, or for other labels, is none for this one, whatever its shape.
    left = () if _same_task(run, config, labels) else ("task_head.",)
    shapes = {name: shape for name, shape in found.shapes.items() if not name.startswith(left)}

    def is_reset(name: str) -> bool:
        layer = layer_of(name, config.model)
        return layer is not None and layer >= first

    begin = (name for name in frozen if not name.endswith(FACTORS))
    if random := sorted(name for name in begin if name not in shapes or is_reset(name)):
        field = "optimizer.freeze" if config.model.lora is None else "model.lora"
        raise UserError(f"{field}: {random[0]} would begin at random weights and never learn")

    def values(path: str, parameter: nn.Parameter) -> Tensor:
        made = initial_values(path, parameter, seed)
        for piece in parameter.pieces:  # type: ignore[attr-defined]
            name = canonical(path, piece)
            if name in shapes and not is_reset(name):
                if shapes[name] != piece.shape:
                    raise UserError(f"{found.folder}: {name} is {shapes[name]}, this model's {piece.shape}")
                view(made, piece).copy_(found.read_box(name, piece.offset, piece.size))
            elif not (name.startswith(HEADS) or name.endswith(FACTORS) or is_reset(name)):
                raise UserError(f"{found.folder}: lacks {name}, which this model needs")
        return made

    files = sorted(info["sha256"] for info in found.checkpoint.files.values())
    digest = hashlib.sha256(" ".join(files).encode()).hexdigest()
    return Start(values, f"from {config.model.initial}, step {found.checkpoint.state.step}", digest)


def _same_task(run: Path, config: Config, labels: LabelSet | None) -> bool:
    return labels is not None and run_config(run).objective.kind == config.objective.kind and run_labels(run) == labels


def _first_reset(config: Config) -> int:
    """The first layer that begins at random, counted through the model: a decoder's are behind its encoder's."""
    assert config.model.reset != "all"
    return config.model.total_layers - config.model.reset


def _run(initial: Path, run: Path, grid: Grid) -> Path:
    """The run of ours that it is, or that is made of it."""
    problem: str | None = None
    imported = run / IMPORTED
    if is_foreign(initial) and grid.rank == 0 and not imported.is_dir():
        from pretrain.huggingface.importing import import_folder

        try:
            import_folder(initial, imported, say=lambda line: None)
        except UserError as error:
            problem = str(error)
    if problem := grid.from_first(problem):
        raise UserError(problem)
    return imported if is_foreign(initial) else initial
