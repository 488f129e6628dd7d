"""Ranks that were not given the same stop before they build a model, and say who differs in what."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from pretrain import agreement
from pretrain.errors import UserError
from pretrain.runs import PACKAGES
from tests.distributed import REPOSITORY, run_ranks, start_python
from tests.training import write_config

HOST = socket.gethostname()


def check_here(config_path: str, differ: dict[int, str], other: str) -> tuple[str, str]:
    """Agree in this rank's place, where the ranks in `differ` were given something else. How it ended, and the message."""
    from importlib.metadata import version

    from parallel.grid import start_grid
    from parallel.layout import Layout, rank_and_world
    from pretrain import runs
    from pretrain.data.sources import Sources

    rank, world = rank_and_world()
    overrides, what = [], differ.get(rank, "")
    if "=" in what:
        overrides = [what]
    if what == "data":
        os.chdir(other)  # as on another host: the same path, other files
    if what == "code":
        agreement.__file__ = f"{other}/pretrain/agreement.py"
    if what == "version":
        agreement.version = lambda name: "9.9" if name == "torch" else version(name)
    config = runs.open_config(config_path, overrides, world)
    sources = Sources.open(config)
    grid = start_grid(Layout.of(config.parallel, world), 60)
    options = {"--profile": "5" if what == "profile" else "None"}
    try:
        agreement.check(config, sources, grid, options)
    except UserError as error:
        return "told", str(error)
    except SystemExit as error:
        return f"exit {error.code}", ""
    return "agreed", ""


def agree(path: Path, differ: dict[int, str], other: Path, world: int = 3) -> list[tuple[str, str]]:
    outcomes: list[tuple[str, str]] = run_ranks(world, check_here, str(path), differ, str(other))
    return outcomes


@pytest.fixture
def config(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose data lie under a relative path."""
    monkeypatch.chdir(tiny_data.parent)
    return write_config(tmp_path, Path("shards"), **{"batch: {size: 8,": "batch: {size: 12,"})


def test_ranks_that_were_given_the_same_go_on(config: Path, tmp_path: Path) -> None:
    assert agree(config, {}, tmp_path) == [("agreed", "")] * 3


def test_the_rank_with_another_override_is_named_with_field_and_both_values(config: Path, tmp_path: Path) -> None:
    first, second, third = agree(config, {1: "optimizer.learning_rate=0.5"}, tmp_path)
    assert first == second and first[0] == "told" and third == ("exit 2", "")
    lines = first[1].splitlines()
    assert f"rank 1 ({HOST}) differs" in lines[0]
    assert lines[1:-1] == ["  config optimizer.learning_rate: 0.5 on rank 1, 0.01 elsewhere"]


def test_a_rank_that_alone_is_to_profile_is_named(config: Path, tmp_path: Path) -> None:
    outcomes = agree(config, {2: "profile"}, tmp_path)
    assert "--profile: 5 on rank 2, None elsewhere" in outcomes[0][1]


def test_every_difference_of_every_rank_is_told(config: Path, tmp_path: Path) -> None:
    differ = {0: "run.seed=7", 2: "data.lanes=3"}
    outcomes = agree(config, differ, tmp_path)
    assert [how for how, _ in outcomes] == ["told", "exit 2", "told"]
    message = outcomes[0][1]
    assert f"ranks 0 ({HOST}), 2 ({HOST}) differ from" in message
    assert "config run.seed: 7 on rank 0, 1 elsewhere" in message
    assert "config data.lanes: 3 on rank 2, " in message
    assert len(message.splitlines()) == 4  # and not the data's fingerprint, which follows from these


def test_of_two_ranks_the_first_is_right(config: Path, tmp_path: Path) -> None:
    first, second = agree(config, {1: "run.seed=7"}, tmp_path, world=2)
    assert first == second and first[0] == "told"
    assert "rank 1 " in first[1] and "config run.seed: 7 on rank 1, 1 elsewhere" in first[1]


def test_another_copy_of_the_data_is_told_by_its_manifest(config: Path, tmp_path: Path, tiny_data: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "other" / "shards")
    manifest = tmp_path / "other" / "shards" / "validation" / "manifest.json"
    value = json.loads(manifest.read_text()) | {"text_bytes": 12345}
    manifest.write_bytes(agreement.canonical(value))
    first, second, third = agree(config, {2: "data"}, tmp_path / "other")
    assert first == third and first[0] == "told" and second == ("exit 2", "")
    names = [line.partition(": ")[0].strip() for line in first[1].splitlines()[1:-1]]
    assert names == ["data.validation, shards/validation/manifest.json"]
    assert " on rank 2, " in first[1]


def test_another_version_is_told_by_its_package(config: Path, tmp_path: Path) -> None:
    first, second, _ = agree(config, {1: "version"}, tmp_path)
    assert first == second
    assert [line.partition(" elsewhere")[0].rpartition(",")[0] for line in first[1].splitlines()[1:-1]] == [
        "  version of torch: 9.9 on rank 1"
    ]


def test_other_code_is_told_by_its_file(config: Path, tmp_path: Path) -> None:
    for package in agreement.CODE:
        shutil.copytree(REPOSITORY / package, tmp_path / package)
    with open(tmp_path / "parallel" / "stages.py", "a") as file:
        file.write("# mended on one host\n")
    first, second, third = agree(config, {2: "code"}, tmp_path)
    assert first == third and second == ("exit 2", "")
    assert [line.partition(": ")[0] for line in first[1].splitlines()[1:-1]] == ["  code parallel/stages.py"]


def test_all_that_decides_a_run_is_compared(config: Path) -> None:
    from pretrain.config.load import load_config
    from pretrain.data.sources import Sources

    loaded = load_config(config)
    names = set(agreement.facts(loaded, Sources.open(loaded)))
    assert {"version of python", *(f"version of {name}" for name in PACKAGES)} <= names
    assert {"config parallel.tensor", "config batch.ramp", "config optimizer.betas", "data fingerprint"} <= names
    files = {
        f"code {path.relative_to(REPOSITORY)}" for name in agreement.CODE for path in (REPOSITORY / name).rglob("*.py")
    }
    assert files <= names and len(files) > 50


def test_many_differences_are_cut_short() -> None:
    ours, theirs = ({f"code {number}": value for number in range(100)} for value in "ab")
    _, message = agreement.told([ours, ours, theirs], ["one", "two", "three"])
    assert len(message.splitlines()) == agreement.LINES + 3
    assert f"and {100 - agreement.LINES} more" in message


def test_the_command_exits_2_on_every_rank_before_anything_is_made(tmp_path: Path, tiny_data: Path) -> None:
    path = write_config(tmp_path, tiny_data, **{"zero: 0": "zero: 0, timeout: 60.0"})
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    ranks: list[subprocess.Popen[str]] = []
    for rank, override in enumerate(["batch.micro_size=2", "batch.micro_size=4"]):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        ranks.append(start_python(["pretrain", "train", path, override], env={**place, "MASTER_PORT": port}))
    for process in ranks:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        assert err.count("error: ") == 1 and "Traceback" not in err
        assert "config batch.micro_size: 4 on rank 1, 2 elsewhere" in err
    assert not (tmp_path / "run").exists()
