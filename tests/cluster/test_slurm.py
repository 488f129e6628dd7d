"""Jobs of `python -m launch slurm` on a real Slurm: they train as a local run does, and outlive what ends jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import attempts
from tests.cluster.jobs import Reference, Submitted, logged
from tests.cluster.slurm import Cluster, rank_processes
from tests.distributed import REPOSITORY
from tests.launch.jobs import events
from tests.training import write_config

PREFIX = str(Path(sys.prefix).resolve())  # of this interpreter's packages
SHARE = ("--cpus", "1")  # of a node, else all of it


def test_a_job_of_two_nodes_trains_as_a_local_run(
    slurm: Cluster, tmp_path: Path, tiny_data: Path, reference: Reference
) -> None:
    job = Submitted(slurm, tmp_path, tiny_data, "--time", "10", steps=10)
    slurm.wait_for_state(job.job, "RUNNING")
    assert job.status()["state"] == "running"
    job.wait()
    assert logged(job.run) == reference(10)
    found = job.status()
    assert (found["state"], found["step"], found["checkpoint"]["step"]) == ("finished", 10, 10)
    assert "node 1 of 2" in job.log and job.ends() == [("finished", "none")]


def test_at_the_time_limit_it_saves_and_goes_on(
    slurm: Cluster, tmp_path: Path, tiny_data: Path, reference: Reference
) -> None:
    """Slurm asks at any time up to a minute before it was told to; the second attempt gets a longer limit."""
    job = Submitted(slurm, tmp_path, tiny_data, "--time", "2", "--stop-before", "85", "checkpoint.every=100000 steps")
    job.wait_for_end(1)
    slurm.ask("scontrol", "update", f"JobId={job.job}", "TimeLimit=20")
    [first] = events(job.run, "end")
    assert first["code"] == 75 and first["new"] == first["step"] > 0, job.log
    job.wait_for_step(first["step"] + 5)
    job.stop()
    assert job.ends() == [("time limit", "requeue"), ("asked to stop", "none")], job.log
    assert logged(job.run) == reference(job.step())
    assert f"going on after step {first['step']}" in job.log
    assert "asked the run to save and end" in job.log and not (job.run / "stop").exists()


def test_a_killed_rank_ends_the_job_at_once_and_it_goes_on(
    slurm: Cluster, tmp_path: Path, tiny_data: Path, reference: Reference
) -> None:
    job = Submitted(slurm, tmp_path, tiny_data, "--time", "10")
    job.wait_for_step(12)
    os.kill(rank_processes(job.job)[1], signal.SIGKILL)
    started = time.monotonic()
    job.wait_for_end(1)
    took = time.monotonic() - started
    job.wait_for_step(job.step() + 5)
    job.stop()
    assert job.ends() == [("failed", "requeue"), ("asked to stop", "none")], job.log
    assert "rank 1 was killed by SIGKILL" in job.log
    assert logged(job.run) == reference(job.step())
    assert took < 5.0, f"{took:.1f} s\n{job.log}"


def test_a_dead_node_sends_the_job_back_to_the_queue(
    slurm: Cluster, tmp_path: Path, tiny_data: Path, reference: Reference
) -> None:
    """The node of the batch script: nothing of the job is left to say that it ended."""
    job = Submitted(slurm, tmp_path, tiny_data, "--time", "10")
    job.wait_for_step(7)
    slurm.kill_node("n1")
    job.wait_for(lambda: slurm.state(job.job) == "PENDING", "requeue")
    before = job.step()
    slurm.start_node("n1")
    job.wait_for(lambda: len(events(job.run, "begin")) == 2, "second attempt")
    job.wait_for_step(before + 5)
    job.stop()
    assert "NODE_FAIL" in (slurm.folder / "jobs.log").read_text()
    assert job.ends() == [("asked to stop", "none")], job.log
    assert logged(job.run) == reference(job.step())
    assert [one["why"] for one in job.status()["attempts"]] == [None, "asked to stop"]


def test_a_crash_that_comes_again_is_not_tried_for_ever(slurm: Cluster, tmp_path: Path, tiny_data: Path) -> None:
    faulty = tmp_path / "faulty"
    faulty.mkdir()
    # Before torch is imported: the crash, not its speed, is what matters here.
    (faulty / "sitecustomize.py").write_text(
        "import sys\nif 'train' in sys.orig_argv: raise SystemExit('a crash that comes again')\n"
    )
    path = f"{faulty}:{REPOSITORY}"
    job = Submitted(slurm, tmp_path, tiny_data, "--time", "10", "--env", f"PYTHONPATH={path}")
    job.wait(state="FAILED")
    assert [follows for _, follows in job.ends()] == ["requeue", "none"], job.log
    assert "two attempts in a row saved no step" in job.log and "a crash that comes again" in job.log
    assert job.status()["state"].startswith("failed")


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Cluster, tmp_path: Path, tiny_data: Path) -> None:
    job = Submitted(slurm, tmp_path, tiny_data, "--time", "10", "checkpoint.every=100000 steps")
    job.wait_for_step(3)
    slurm.ask("scancel", job.job)
    job.wait(state="CANCELLED")
    slurm.wait_for(lambda: not rank_processes(job.job), "end of the ranks")
    assert attempts.newest_step(job.run) >= 3, job.log
    time.sleep(2)
    assert slurm.state(job.job) == "CANCELLED"


def test_seeds_are_runs_of_their_own(slurm: Cluster, tmp_path: Path, tiny_data: Path) -> None:
    """One node each, and each rank a task of Slurm's."""
    job = Submitted(
        slurm, tmp_path, tiny_data, "--nodes", "1", *SHARE, "--time", "10", "--seeds", "1-2", "--direct", steps=5
    )
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"), "an empty queue", 180)
    runs = [job.run / f"seed-{seed}" for seed in (1, 2)]
    said = slurm.run([sys.executable, "-m", "launch", "status", job.run, "--json"]).stdout
    found = [json.loads(line) for line in said.splitlines()]
    assert [(one["state"], one["step"], one["run"]) for one in found] == [("finished", 5, str(run)) for run in runs], (
        said
    )
    one, other = map(logged, runs)
    assert one.keys() == other.keys() and all(one[step] != other[step] for step in one)
    assert (job.run / "logs" / f"slurm-{job.job}_2.out").exists()


def test_a_chain_under_a_hostile_name_trains_once_and_is_done(slurm: Cluster, tmp_path: Path, tiny_data: Path) -> None:
    name = "a b'\"$(touch hacked)`touch hacked`;#\n#SBATCH --time=1\n*"
    job = Submitted(
        *(slurm, tmp_path, tiny_data, *SHARE, "--time", "10", "--chain", "2", "--env", f"VALUE={name}\\%j"),
        *("--direct", f"run.dir={json.dumps(str(tmp_path / name))}"),
        steps=3,
    )
    run = tmp_path / name
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"), "an empty queue", 180)
    assert [line["jobs"] for line in events(run, "submitted")] == [[job.job, str(int(job.job) + 1)]]
    assert [line["why"] for line in events(run, "end")] == ["finished"]
    logs = [run / "logs" / f"slurm-{int(job.job) + link}.out" for link in (0, 1)]
    assert "finished: 3 steps" in logs[0].read_text() and "nothing is left to do" in logs[1].read_text()
    assert not list(tmp_path.rglob("hacked")) and not (REPOSITORY / "hacked").exists()
    assert slurm.ask("scontrol", "show", "job", job.job).count("TimeLimit=00:10:00") == 1


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """A root file system with this interpreter and its packages, and a mark by which it is known from inside."""
    folder = tmp_path / "image"
    for name in ("bin", "lib", "lib64"):
        folder.mkdir(exist_ok=True)
        (folder / name).symlink_to(f"usr/{name}")
    for name in ("tmp", "mark"):
        (folder / name).mkdir()
    (folder / "mark" / "sitecustomize.py").write_text("import sys; print('inside the image', file=sys.stderr)\n")
    mounted = [folder / path.lstrip("/") for path in dict.fromkeys(["/usr", "/etc", sys.base_prefix, PREFIX])]
    try:
        for place in mounted:
            place.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", f"/{place.relative_to(folder)}", place], check=True)
        yield folder
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", "--lazy", place], check=False)


def test_pyxis_is_given_what_the_run_needs(slurm: Cluster, tmp_path: Path, tiny_data: Path, image: Path) -> None:
    """By a stand-in for it: in the image there are the folders of the run, the data and the program, and no others."""
    inside = ("--env", f"PATH={PREFIX}/bin:/usr/bin:/bin", "--env", "PYTHONPATH=/mark")
    words = ("--nodes", "1", "--time", "10", "--container", "pyxis", "--image", str(image), *inside)
    job = Submitted(slurm, tmp_path / "work", tiny_data, *words, steps=3)
    job.wait()
    assert "inside the image" in job.log and job.ends() == [("finished", "none")], job.log
    assert "finished: 3 steps" in job.log


SCRIPTS = {
    "gpus": ["--gpus-per-node", "2", "--partition", "main", "--constraint", "fast", "--stop-before", "600"],
    "gpus, a task a rank": ["--gpus-per-node", "2", "--nodes", "1", "--direct", "--exclude", "n2", "--cpus", "2"],
    "whole nodes": ["--processes-per-node", "2", "--memory", "1G", "--account", "a", "--qos", "normal"],
    "docker": ["--gpus-per-node", "2", "--container", "docker", "--image", "engine:1"],
    "pyxis": ["--cpus", "2", "--container", "pyxis", "--image", "host#engine:1"],
    "chain": ["--chain", "3", "--env", "A=b c", "--env", "HOME"],
    "seeds": ["--seeds", "1-4,9", "--at-once", "2"],
}


@pytest.mark.parametrize("options", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_slurm_and_shellcheck_take_every_script(
    slurm: Cluster, tmp_path: Path, tiny_data: Path, options: list[str]
) -> None:
    config = write_config(tmp_path, tiny_data)
    words = [
        sys.executable,
        "-m",
        "launch",
        "slurm",
        config,
        "--nodes",
        "2",
        "--time",
        "1:00:00",
        "--dry-run",
        *options,
    ]
    script = tmp_path / "job.sh"
    script.write_text(slurm.run(words).stdout)
    checked = slurm.run(["sbatch", "--test-only", script])
    assert checked.returncode == 0 and "to start at" in checked.stderr, checked.stderr
    for lint in (["shellcheck"], ["shfmt", "-d", "-i", "4", "-ci"]):
        linted = subprocess.run([*lint, script], capture_output=True, text=True, check=False)
        assert linted.returncode == 0, linted.stdout


def test_slurm_would_refuse_a_wrong_script(slurm: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --nodes=3\ntrue\n")
    assert slurm.run(["sbatch", "--test-only", script]).returncode != 0
