"""The tree's promises about imports: one direction, configuration without torch, packages that import nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY, run_python

OURS = ("kernels", "parallel", "pretrain", "launch", "tests", "benchmarks")
INSTALLED = ("kernels", "parallel", "pretrain", "launch")
TORCH_FREE = [f"pretrain.{name}" for name in ("errors", "memory", "runs", "schedule")] + [
    "parallel.layout",
    "parallel.ports",
    "launch.__main__",
]
BLOCKED = "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = sys.modules['megatron'] = None"


def modules_of(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """Full names of what a module imports, inside functions too. `from a import b` gives a.b, of which b may be a name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def crossings(package: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of the package that are of our own tree and not allowed."""
    return [
        f"{path.relative_to(REPOSITORY)}: {name}"
        for path in modules_of(package)
        for name in imports_of(path)
        if name.split(".")[0] in OURS and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    ]


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("kernels", ("kernels",)),
        ("parallel", ("parallel", "kernels")),
        ("pretrain", ("pretrain", "parallel", "kernels")),
        ("launch", ("launch", "pretrain.config", "pretrain.errors", "parallel.layout", "parallel.ports")),
    ],
)
def test_imports_go_one_way(package: str, allowed: tuple[str, ...]) -> None:
    assert modules_of(package), f"no modules in {package}"
    assert crossings(package, allowed) == []


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "kernels"}
    found = [(path.name, name) for path in modules_of("kernels") for name in imports_of(path)]
    assert [(file, name) for file, name in found if name.split(".")[0] not in allowed] == []


@pytest.mark.parametrize("package", INSTALLED)
def test_package_files_import_nothing(package: str) -> None:
    files = [path for path in modules_of(package) if path.name == "__init__.py"]
    folders = {path.parent for path in modules_of(package)}
    assert {path.parent for path in files} == folders, "each folder of modules is a package"
    assert [str(path) for path in files if path.read_text().strip()] == []


def test_configuration_and_launcher_import_without_torch(tmp_path: Path) -> None:
    config = [f"pretrain.config.{path.stem}" for path in modules_of("pretrain/config") if path.stem != "__init__"]
    (tmp_path / "blocked.py").write_text("\n".join([BLOCKED, *(f"import {name}" for name in [*config, *TORCH_FREE])]))
    result = run_python(["blocked"], cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command", [["pretrain", "--help"], ["pretrain", "train", "--help-config"], ["launch", "--help"]]
)
def test_help_needs_no_torch(command: list[str], tmp_path: Path) -> None:
    run = f"import runpy; sys.argv[1:] = {command[1:]}; runpy.run_module('{command[0]}', run_name='__main__')"
    (tmp_path / "blocked.py").write_text(f"{BLOCKED}\n{run}\n")
    result = run_python(["blocked"], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def imported_by(arguments: list[str]) -> set[str]:
    """Packages outside the standard library and our own that `python ARGUMENTS` imports, by the interpreter's own list."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
    names = re.findall(r"^import time: .*\| +(\S+)$", result.stderr, re.MULTILINE)
    assert "argparse" in names or "-c" in arguments
    return {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, *INSTALLED}


@pytest.mark.parametrize(
    "command",
    ["pretrain --help", "pretrain train --help", "launch --help", "launch local --help", "launch slurm --help"],
)
def test_help_imports_the_standard_library_alone(command: str) -> None:
    """So that it is there at once. What an environment imports at every start (.pth files) is not ours."""
    environments = imported_by(["-c", "print('nothing')"])
    assert imported_by(["-m", *command.split()]) - environments == set()


def test_the_configs_help_imports_nothing_that_computes() -> None:
    found = imported_by(["-m", "pretrain", "train", "--help-config"])
    assert "pydantic" in found
    assert (
        found & {"torch", "numpy", "triton", "deepspeed", "megatron", "rich", "sentencepiece", "tensorboard"} == set()
    )


def test_an_import_that_is_no_help_would_be_found() -> None:
    assert "numpy" in imported_by(["-c", "import numpy; print('here')"])
