"""What the image installs before the code: `requirements.txt` and `pins.txt`, written here from pyproject.toml and
constraints.txt. A torch that the base image brings is kept, so it and its Triton have no pin then."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

EXTRAS = ("finetune",)  # what a run may need; tests and checks stay outside
OF_TORCH = ("torch", "triton")


def main() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = [requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra]]
    pins = Path("constraints.txt").read_text().splitlines()
    if importlib.util.find_spec("torch") is not None:
        pins = [pin for pin in pins if re.split("[=<>]", pin)[0] not in OF_TORCH]
    Path("requirements.txt").write_text("\n".join([*project["dependencies"], *extras, ""]))
    Path("pins.txt").write_text("\n".join([*pins, ""]))


if __name__ == "__main__":
    main()
