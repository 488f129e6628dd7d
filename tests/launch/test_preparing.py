"""`python -m launch slurm DIR --tasks N`: what is submitted for a folder that was planned, and that it prepares the folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pretrain.data.prepare import plan_only
from pretrain.data.preparing.options import Options
from tests.distributed import REPOSITORY
from tests.launch.jobs import Slurm, directives, launched, rendered
from tests.pretrain.data.corpus import hashes, quietly, stdlib_texts, write_texts

WISHED = {"vocab_size": 420, "max_train_bytes": 20_000, "validation": 0.2}
SIZE = ("--tasks", "3", "--time", "10", "--cpus", "1")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "my texts", stdlib_texts(12))


@pytest.fixture
def planned(texts: Path, tmp_path: Path) -> Path:
    out = tmp_path / "my shards"
    plan_only([texts], out, Options(piece_bytes=9000, **WISHED), processes=1, say=lambda _: None)  # type: ignore[arg-type]
    return out


def draft(out: Path) -> Path:
    return out.parent / f".{out.name}.preparing"


def test_an_array_and_a_merge_behind_it_are_submitted_and_prepare_the_folder(
    slurm: Slurm, planned: Path, texts: Path, tmp_path: Path
) -> None:
    """The scripts are run as Slurm would run them: the tasks in any order, then the merge."""
    assert launched("slurm", planned, *SIZE, "--env", "MARK=a b") == 0
    scripts = draft(planned) / "launch"
    assert slurm.words("sbatch") == [
        *("--parsable", f"--chdir={draft(planned)}", f"{scripts}/encode.sh"),
        *("--parsable", "--dependency=afterok:41", "--kill-on-invalid-dep=yes", f"--chdir={draft(planned)}"),
        f"{scripts}/merge.sh",
    ]
    assert (draft(planned) / "logs").is_dir() and "export MARK='a b'" in (scripts / "encode.sh").read_text()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for name, task in (("encode", "2"), ("encode", "0"), ("encode", "1"), ("merge", "")):
        subprocess.run(["bash", scripts / f"{name}.sh"], env={**environment, "SLURM_ARRAY_TASK_ID": task}, check=True)
    quietly([texts], tmp_path / "direct", **WISHED)
    found = {name: digest for name, digest in hashes(planned).items() if not name.startswith("launch/")}
    assert found == hashes(tmp_path / "direct")


def test_dry_run_prints_both_scripts_and_writes_nothing(
    slurm: Slurm, planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = rendered(capsys, [planned, *SIZE, "--at-once", "2", "--partition", "cpu", "--memory", "4G"])
    first, second = (f"#!/bin/bash{part}" for part in text.split("#!/bin/bash")[1:])
    shared = {"--nodes": "1", "--ntasks": "1", "--time": "10", "--cpus-per-task": "1", "--partition": "cpu"}
    shared |= {"--mem": "4G", "--open-mode": "append", "--requeue": ""}
    names = {"--job-name": "my_shards-encode", "--array": "0-2%2", "--output": "logs/encode-%A_%a.out"}
    assert directives(first) == {**shared, **names}
    assert directives(second) == {**shared, "--job-name": "my_shards-merge", "--output": "logs/merge-%j.out"}
    assert '--task "$SLURM_ARRAY_TASK_ID" --tasks 3 --processes 1' in first and "--merge --processes 1" in second
    for script in (first, second):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert not (slurm.folder / "sbatch").exists() and not (draft(planned) / "launch").exists()
    whole = rendered(capsys, [planned, "--tasks", "1", "--time", "10"])
    assert "#SBATCH --exclusive" in whole and "#SBATCH --mem=0" in whole and "--processes" not in whole


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "0", "--time", "10"], ["--tasks: 1 to 10,000, not 0"]),
        (["--tasks", "10001", "--time", "10"], ["--tasks: 1 to 10,000, not 10001"]),
        (["--tasks", "2", "--time", "soon"], ["--time: 'soon' is no time limit"]),
        ([*SIZE, "--partition", "a b"], ["--partition: 'a b'"]),
        ([*SIZE, "--at-once", "0"], ["--at-once: at least 1"]),
        ([*SIZE, "--setup", "none.sh"], ["--setup: none.sh: there is no such file"]),
        (
            [*SIZE, "--nodes", "2", "--gpus-per-node", "8", "run.seed=2"],
            ["--nodes: is of a run", "--gpus-per-node: is", "section"],
        ),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_mistakes_are_told_before_anything_is_submitted(
    slurm: Slurm, planned: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    assert launched("slurm", planned, *options) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert not (slurm.folder / "sbatch").exists() and not (draft(planned) / "launch").exists()


def test_a_folder_without_a_plan_or_in_the_hands_of_a_job_is_refused(
    slurm: Slurm, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched("slurm", tmp_path / "none", *SIZE) == 2
    assert "is no folder that `python -m pretrain prepare TEXT... --out DIR --plan` planned" in capsys.readouterr().err
    assert launched("slurm", planned, *SIZE) == 0
    (slurm.folder / "queue").write_text("41|41|RUNNING|None|n1\n")
    assert launched("slurm", planned, *SIZE) == 2
    assert "is in the hands of job 41" in capsys.readouterr().err


def test_a_run_still_needs_its_nodes(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert launched("slurm", REPOSITORY / "configs" / "gpt" / "demo.yaml", "--time", "10") == 2
    assert "--nodes: how many are needed is not given" in capsys.readouterr().err
