"""A real Slurm and a real Docker engine, started once a session for all tests that ask for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import docker
from tests.cluster.docker import Engine
from tests.cluster.jobs import Reference
from tests.cluster.namespaces import namespace
from tests.cluster.slurm import Cluster, cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    source, plugin = Path(__file__).with_name("pyxis.c"), folder / "pyxis.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", plugin, source], check=True)
    (folder / "plugstack.conf").write_text(f"required {plugin}\n")
    with cluster(folder / "cluster", more=f"PlugStackConfig={folder / 'plugstack.conf'}") as up:
        yield up


@pytest.fixture(scope="session")
def reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"), tiny_data)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """One in a network of its own, with the image of the working tree."""
    folder = Path(os.environ.get("CLUSTER_CACHE") or tempfile.mkdtemp(prefix="docker-"))
    folder.mkdir(exist_ok=True)
    try:
        with docker.running(folder) as builder:
            docker.build(builder)
        with namespace("d") as network, docker.running(folder, network) as engine:
            yield engine
    finally:
        if "CLUSTER_CACHE" not in os.environ:
            shutil.rmtree(folder)
