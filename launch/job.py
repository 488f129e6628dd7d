"""A run on Docker hosts as the lines of sh that start and check its containers. Every word is quoted; nothing is run here."""

from __future__ import annotations

import csv
import io
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.containers import Container
from launch.hosts import Subject
from launch.limits import CONFINED

IMAGE_USER = "10001:10001"  # docker/Dockerfile's


@dataclass(frozen=True)
class Mount:
    source: str
    target: str
    readonly: bool = False

    @property
    def option(self) -> str:
        """For docker's --mount, which is read as CSV: commas and quotes in a path are a path's."""
        line = io.StringIO()
        fields = ["type=bind", f"source={self.source}", f"target={self.target}"]
        csv.writer(line, lineterminator="").writerow([*fields, "readonly"] if self.readonly else fields)
        return f"--mount={line.getvalue()}"


@dataclass(frozen=True)
class Job:
    """A run, as its containers see it."""

    hosts: Sequence[str]
    name: str  # of its containers, but for the node's rank
    folder: Path
    image: str
    processes: int  # on each host
    gpus: int  # on each host; 0: none
    environment: dict[str, str]
    mounts: Sequence[Mount]
    options: Sequence[str]  # of docker run, by the user's wish
    user: str | None
    master: str
    port: int
    stop_seconds: int
    arguments: Sequence[str]  # of the entry point's `train`


def container_of(job: Job, rank: int) -> Container:
    name = f"{job.name}-{rank}"
    return Container(
        host=job.hosts[rank],
        name=name,
        run=docker_run(job, rank, [f"--name={name}"], ["train", *job.arguments]),
        exports=exports_of(job),
        stop_seconds=job.stop_seconds,
    )


def subjects_of(job: Job) -> list[Subject]:
    """What is to be checked on each host: with a container that has all that the run's will have, but its name."""
    token = secrets.token_hex(8)
    subjects = []
    for rank, host in enumerate(job.hosts):
        place = {"nodes": len(job.hosts), "node-rank": rank, "address": job.master, "port": job.port}
        about = place | {"gpus": job.gpus, "folder": job.folder, "token": token}
        command = ["python", "-m", "launch.probe", *(f"--{name}={value}" for name, value in about.items())]
        probe = f"{exports_of(job)}\n{docker_run(job, rank, [], command)} </dev/null"
        folders = [mount.source for mount in job.mounts]
        subjects.append(Subject(host, f"{job.name}-{rank}", job.image, folders, probe))
    return subjects


def docker_run(job: Job, rank: int, options: Sequence[str], command: Sequence[str]) -> str:
    """Lines of sh that run a command in a container as the run's are."""
    place = {
        "NNODES": len(job.hosts),
        "NODE_RANK": rank,
        "MASTER_ADDR": job.master,
        "MASTER_PORT": job.port,
        "PROCESSES": job.processes,
    }
    words = [
        *CONFINED,
        "--pull=never",  # what was checked is what runs
        *options,
        *job.options,
        *(mount.option for mount in job.mounts),
        f"--workdir={job.mounts[0].target}",
        *(f"--env={name}={value}" for name, value in place.items()),
        *(f"--env={name}" for name in job.environment),
        *(job.image, *command),
    ]
    if job.user is not None:
        return f"docker run --user={job.user} {shlex.join(words)}"
    user = f"user=$(id -u):$(id -g); case $user in 0:*) user={IMAGE_USER} ;; esac"
    return f'{user}\ndocker run --user="$user" {shlex.join(words)}'


def exports_of(job: Job) -> str:
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in job.environment.items())
