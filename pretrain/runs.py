"""A run's folder: opening its config, claiming it, and what it says of itself."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.folder import BEFORE_THE_RUN, CHECKPOINTS, CONFIG
from pretrain.config.load import dump_config, fitting_problems, load_config, problem_error, resume_problems
from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.finetuning.opening import LABELS, keep_labels
from pretrain.inherit import with_initial
from pretrain.tokenization.foreign import FILES, load_tokenizer

if TYPE_CHECKING:
    from parallel.grid import Grid
    from pretrain.data.sources import Sources
    from pretrain.tokenization.base import Tokenizer

IMPORTED = "initial"  # inside a run's folder: the model of Hugging Face's that it started from
PACKAGES = ("torch", "deepspeed", "megatron-core")


def open_config(source: str, overrides: list[str], world: int) -> Config:
    """The config of a YAML file, or of a run's folder. Raises UserError with everything that keeps it from `world`
    processes or from going on where its folder's checkpoints are."""
    path = Path(source)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: no {CONFIG} in it, so this is no run's folder; give a config file to start one")
        config = load_config(path / CONFIG, [f"run.dir={json.dumps(str(path))}", *overrides])
    else:
        config = load_config(path, overrides)
        saved = load_config(Path(config.run.dir) / CONFIG) if (Path(config.run.dir) / CONFIG).is_file() else None
        config = with_initial(config, saved)
    problems = fitting_problems(config, world)
    folder = Path(config.run.dir)
    if (folder / CONFIG).is_file() and any((folder / CHECKPOINTS).glob("step-*")):
        saved = load_config(folder / CONFIG)
        if config.precision.compute == "auto":  # was decided when the run began
            config = config.model_copy(
                update={"precision": config.precision.model_copy(update={"compute": saved.precision.compute})}
            )
        problems += resume_problems(saved, config)
    if problems:
        raise problem_error(f"{source}: this run cannot start", problems)
    if not path.is_dir() and _foreign(folder):
        raise UserError(f"run.dir: {folder} holds files but is no run's folder; choose an empty or a new one")
    return config


def _foreign(folder: Path) -> bool:
    """Whether there is something that is not ours, which a run must not write into."""
    if not folder.is_dir():
        return folder.exists()
    has_tokenizer = any((folder / name).is_file() for name in FILES)
    if (folder / CONFIG).is_file() and (has_tokenizer or (folder / CHECKPOINTS).is_dir()):
        return False
    # The launcher makes some before the run begins, and one that was killed as it began has left no more than the rest.
    ours = {*BEFORE_THE_RUN, IMPORTED, LABELS, *FILES, *(_partial(folder / name).name for name in (*FILES, CONFIG))}
    return any(path.name not in ours for path in folder.iterdir())


def claim_folder(config: Config, grid: Grid, sources: Sources) -> None:
    """Keep the resolved config and the tokenizer in the run's folder, which needs nothing else to go on."""
    folder, problem = Path(config.run.dir), ""
    grid.wait()  # every rank has read what is there
    if grid.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            keep_tokenizer(folder, sources.tokenizer)
            if sources.task is not None:
                _write_whole(folder / LABELS, keep_labels(sources.task.labels))
            _write_whole(folder / CONFIG, dump_config(config).encode())
        except OSError as error:
            problem = f"run.dir: {folder} cannot be written: {error}"
    if problem := grid.from_first(problem):
        raise UserError(problem)


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The one tokenizer of the folder: another's file, of a run that never had a checkpoint, goes."""
    _write_whole(folder / tokenizer.file, tokenizer.content)
    for name in FILES:
        if name != tokenizer.file:
            (folder / name).unlink(missing_ok=True)


def _write_whole(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    partial = _partial(path)
    partial.write_bytes(content)
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def about(grid: Grid, data: str, kernels: str, initial: str) -> dict[str, Any]:
    """What a checkpoint tells of its making: the layout and versions for people, the data's and the initial weights'
    fingerprints and whose kernels computed for a resume."""
    return {
        "layout": str(grid.layout),
        "processes": grid.world,
        "data": data,
        "kernels": kernels,
        "initial": initial,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def run_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer that a run's folder keeps. Raises UserError if it has none, or it was spoiled."""
    found = [name for name in FILES if (run / name).is_file()]
    return load_tokenizer(run / (found or FILES)[0])


def run_config(run: Path) -> Config:
    """The config of a finished or running run, for commands that use its model."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: no {CONFIG} in it, so this is no run's folder")
    return load_config(run / CONFIG, [f"run.dir={json.dumps(str(run))}"])
