"""A run's folder: opening its config, claiming it, and what it says of itself."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.layout import Layout, layout_problems
from pretrain.config.load import check_resume, dump_config, load_config
from pretrain.config.run import Config
from pretrain.errors import UserError

if TYPE_CHECKING:
    from parallel.grid import Grid

CONFIG = "config.yaml"
PACKAGES = ("torch", "deepspeed", "megatron-core")


def open_config(source: str, overrides: list[str], world: int) -> Config:
    """The config of a YAML file, or of a run's folder, with everything checked that can be before torch is touched."""
    path = Path(source)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UserError(f"{path}: no {CONFIG} in it, so this is no run's folder; give a config file to start one")
        config = load_config(path / CONFIG, [f"run.dir={json.dumps(str(path))}", *overrides])
    else:
        config = load_config(path, overrides)
    saved = Path(config.run.dir) / CONFIG
    if saved.is_file():
        check_resume(load_config(saved, []), config)
    check_layout(config, world)
    return config


def check_layout(config: Config, world: int) -> None:
    problems = layout_problems(config, world)
    if problems:
        lines = [f"  {problem.path}: {problem.message}; {problem.mend}" for problem in problems]
        raise UserError("\n".join(["the layout does not fit this run:", *lines]))


def claim_folder(config: Config, grid: Grid) -> None:
    """Make the run's folder and keep the resolved config in it; refuse a folder that holds something else."""
    folder = Path(config.run.dir)
    if folder.exists() and not (folder / CONFIG).is_file() and any(_foreign(folder)):
        raise UserError(f"run.dir: {folder} holds files but is no run's folder; choose an empty or a new one")
    grid.wait()
    if grid.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(folder / CONFIG, dump_config(config))
        except OSError as error:
            raise UserError(f"run.dir: {folder} cannot be written: {error}") from error


def _foreign(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != "logs"]  # the launcher opens the logs first


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def about(grid: Grid, data: str) -> dict[str, Any]:
    """What a checkpoint tells of its making: the layout and versions for people, the data's fingerprint for a resume."""
    return {
        "layout": str(grid.layout),
        "processes": grid.world,
        "data": data,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def run_config(run: Path) -> Config:
    """The config of a finished or running run, for commands that use its model."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: no {CONFIG} in it, so this is no run's folder")
    return load_config(run / CONFIG, [f"run.dir={json.dumps(str(run))}"])
