"""A Slurm of scripts, and a job submitted to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.jobs import CONFIG, LAYOUT, SIZE, Slurm, launched


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.chdir(tmp_path)
    return Slurm(tmp_path / "fake", monkeypatch)


@pytest.fixture
def run(slurm: Slurm, tmp_path: Path) -> Path:
    """A submitted job's folder."""
    assert launched("slurm", CONFIG, *SIZE, *LAYOUT, f"run.dir={tmp_path / 'run'}") == 0
    return tmp_path / "run"
