"""Jobs of Slurm's whose ranks are in containers: both nodes of the tests' Slurm have the tests' Docker engine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import attempts
from tests.cluster.docker import DOCKER, IMAGE, Engine
from tests.cluster.jobs import Reference, Submitted, logged
from tests.cluster.slurm import Cluster, processes


class Contained(Submitted):
    """From a folder of its own: the containers have that, the run and the shards, and the program of the image alone."""

    def __init__(self, engine: Engine, slurm: Cluster, folder: Path, shards: Path, *words: str, steps: int) -> None:
        self.engine = engine
        path = f"{Path(DOCKER).parent}:{os.environ['PATH']}"
        environment = {"DOCKER_HOST": engine.environment["DOCKER_HOST"], "PATH": path}
        words = ("--time", "10", "--container", "docker", "--image", IMAGE, *words)
        super().__init__(slurm, folder, shards, *words, steps=steps, work=folder, environment=environment)

    def containers(self) -> list[str]:
        words = ("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label=pretrain.job={self.job}")
        return self.engine.docker(*words).stdout.split()

    def clients(self) -> dict[int, int]:
        """Process id of `docker run` on each node."""
        return {
            int(variables["SLURM_NODEID"]): pid
            for pid, variables in processes(SLURM_JOB_ID=self.job).items()
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"docker\0run\0")
        }


Submit = Callable[..., Contained]


@pytest.fixture
def submit(engine: Engine, slurm: Cluster, tmp_path: Path, tiny_data: Path) -> Iterator[Submit]:
    jobs: list[Contained] = []

    def one(*words: str, steps: int = 1_000_000) -> Contained:
        jobs.append(Contained(engine, slurm, tmp_path, tiny_data, *words, steps=steps))
        return jobs[-1]

    yield one
    for job in jobs:
        slurm.ask("scancel", job.job)
        engine.docker("rm", "--force", *job.containers(), check=False)


def test_a_job_in_two_containers_trains_as_a_local_run(submit: Submit, reference: Reference) -> None:
    job = submit(steps=10)
    job.wait_for(lambda: len(job.containers()) == 2, "two containers")
    for each in json.loads(job.engine.docker("inspect", *job.containers()).stdout):
        host = each["HostConfig"]
        assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], None, False)
        assert host["SecurityOpt"] == ["no-new-privileges"] and host["IpcMode"] == "private"
    job.wait()
    assert logged(job.run) == reference(10)
    assert job.ends() == [("finished", "none")] and job.containers() == [], job.log


def test_no_container_outlives_its_client_or_its_job(submit: Submit, slurm: Cluster, reference: Reference) -> None:
    """Slurm can kill docker's clients alone. Here one's container hangs, so that the other waits for it."""
    job = submit()
    job.wait_for_step(7)
    first = job.containers()
    job.engine.docker("pause", first[0])
    os.kill(job.clients()[1], signal.SIGKILL)
    job.wait_for_end(1)
    assert len(first) == 2 and not set(first) & set(job.containers()), job.log
    before = job.step()
    job.wait_for_step(before + 3)
    slurm.ask("scancel", job.job)
    job.wait(state="CANCELLED")
    job.wait_for(lambda: not job.containers(), "end of the containers", 60)
    assert attempts.newest_step(job.run) >= before + 3, job.log
    assert job.ends()[0] == ("failed", "requeue"), job.log
    assert logged(job.run) == reference(job.step())
