"""What every command checks before it starts anything: the config, its layout on so many processes, and the run's folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config.folder import BEFORE_THE_RUN, CONFIG
from pretrain.errors import UserError

if TYPE_CHECKING:  # imported when a command runs, so that --help is there at once
    from pretrain.config.run import Config


def add_run_options(command: argparse.ArgumentParser) -> None:
    """What the commands that start a run have in common. argparse cannot take overrides both before and after the
    options, so they are what it leaves: see `launch.__main__.parse`."""
    command.add_argument("config", metavar="CONFIG", help="a YAML file, or a run's folder to go on with")
    command.add_argument("--dry-run", action="store_true", help="check everything, show the commands, start nothing")
    command.set_defaults(overrides=[])


def read_config(source: str, overrides: list[str]) -> Config:
    """That of a YAML file, or of a run's folder to go on with. Raises UserError with all that is wrong in it."""
    from pretrain.config.load import load_config

    path = Path(source)
    if path.is_dir():
        return load_config(path / CONFIG, [f"run.dir={json.dumps(str(path))}", *overrides])
    return load_config(path, overrides)


def open_config(source: str, overrides: list[str], processes: int) -> Config:
    """The same, for so many processes.

    Raises UserError for whatever keeps it from `processes` ranks, or from its folder, that can be known before they start.
    """
    from pretrain.config.load import check_layout

    config = read_config(source, overrides)
    if config.model.initial is None:  # else its shape is not known here, and the ranks check
        check_layout(config, processes)
    check_folder(Path(config.run.dir))
    return config


def check_folder(folder: Path) -> None:
    """The ranks check this too; but logs/ must not be made in a folder that is somebody else's."""
    if not folder.exists() or (folder / CONFIG).is_file():
        return
    if not folder.is_dir() or any(path.name not in BEFORE_THE_RUN for path in folder.iterdir()):
        raise UserError(f"run.dir: {folder} holds files but is no run's folder; choose an empty or a new one")
