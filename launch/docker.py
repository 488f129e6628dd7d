"""`python -m launch docker`: a run on several machines, one container on each, started over ssh.

The container has the host's network, since the ranks of all hosts talk to each other, and nothing else of the host's but
the folders that are mounted: the current one, under its own path, so that a config's relative paths mean the same inside,
and those of --mount. It runs as the user that ssh logs in as (never as root, unless --user says so), without capabilities.

What --env names goes to the host on ssh's standard input and into the container by name: no value stands in a command.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.limits import FOR_GPUS, SHM_SIZE
from launch.opening import add_run_options, open_config
from pretrain.config.profile import add_profile_option
from pretrain.errors import UserError

if TYPE_CHECKING:  # imported when the command runs, so that --help is there at once
    from launch.containers import Container
    from launch.job import Job, Mount

EXAMPLE = "python -m launch docker configs/gpt/demo.yaml --hosts node1,node2 --gpus 8 parallel.tensor=8"
# What the container's own variables must not replace: they say where it stands among the others.
OURS = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PROCESSES", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PATH"}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`commands`: what argparse's add_subparsers gave."""
    docker: argparse.ArgumentParser = commands.add_parser(
        "docker",
        help="one container on each of several hosts",
        description="Train in one container on each host, started over ssh. Checks ssh, docker, image, GPUs, clocks, disk and "
        "ports of all hosts first. The current folder is mounted under its own path; run.dir has to lie on a file system that "
        "all hosts share. Ctrl-C saves and ends all; the same command goes on.",
        usage="python -m launch docker CONFIG --hosts A,B,... (--gpus N | --processes N) [options] [section.key=value ...]",
        epilog=f"example: {EXAMPLE}",
    )
    add_run_options(docker)
    docker.add_argument(
        "--hosts", required=True, metavar="A,B,...", help="as ssh knows them; the first one is node rank 0"
    )
    docker.add_argument("--exclude", default="", metavar="A,B,...", help="hosts of these to leave out")
    each = docker.add_mutually_exclusive_group(required=True)
    each.add_argument("--gpus", type=int, metavar="N", help="GPUs, and so processes, on each host")
    each.add_argument("--processes", type=int, metavar="N", help="processes on each host, on CPUs")
    docker.add_argument("--image", default="pretrain-engine", help="of docker/Dockerfile (default: pretrain-engine)")
    docker.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="for the container; NAME alone: its value here",
    )
    docker.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="FOLDER[:TARGET][:ro]",
        help="a host's folder (default TARGET: the same)",
    )
    docker.add_argument("--device", action="append", default=[], metavar="PATH", help="for instance /dev/infiniband")
    docker.add_argument(
        "--user", metavar="UID[:GID]", help="of the processes (default: the user of ssh; root: the image's)"
    )
    docker.add_argument(
        "--shm-size", default=SHM_SIZE, metavar="SIZE", help=f"of /dev/shm, for NCCL (default: {SHM_SIZE})"
    )
    docker.add_argument("--master", metavar="ADDRESS", help="of the first host, for the others (default: its name)")
    docker.add_argument("--port", type=int, metavar="N", help="that it listens on (default: by the run's folder)")
    docker.add_argument(
        "--stop-seconds",
        type=int,
        default=600,
        metavar="N",
        help="that saving may take when a run is to end (default: 600)",
    )
    add_profile_option(docker)
    return docker


def run(args: argparse.Namespace) -> int:
    """Check config and hosts, start a container on each host and follow them; returns the exit code of the first to fail.

    Raises UserError, before anything starts, for whatever can be known now.
    """
    from launch import hosts
    from launch.attempts import recorded
    from launch.containers import Containers
    from launch.job import container_of, subjects_of
    from launch.ranks import say

    job = job_of(args)
    containers = [container_of(job, rank) for rank in range(len(job.hosts))]
    if args.dry_run:
        _show(job, containers)
        return 0
    hosts.check(subjects_of(job))
    say(f"{len(job.hosts)} hosts, {job.processes} processes each, meeting at {job.master}:{job.port}")
    wait = Containers(containers).wait
    # For `launch status`, where this machine shares the run's folder, and may write there.
    return recorded(job.folder, wait) if os.access(job.folder, os.W_OK) else wait()


# -- the job ---------------------------------------------------------------------------------------------------------


def job_of(args: argparse.Namespace) -> Job:
    from launch.job import Job, Mount
    from parallel.ports import PORTS

    names = hosts_of(args.hosts, args.exclude)
    processes = args.gpus if args.gpus is not None else args.processes
    if processes < 1:
        raise UserError(f"--gpus and --processes: at least 1 on each host, not {processes}")
    config = open_config(args.config, args.overrides, processes * len(names))
    here = os.getcwd()
    if here == "/":
        raise UserError("start in the folder that the containers are to have, not in /, which is all of the hosts'")
    mounts = [Mount(here, here), *map(mount_of, args.mount)]
    folder = Path(here, config.run.dir)
    for what, path in (("CONFIG", Path(here, args.config)), ("run.dir", folder)):
        _check_mounted(what, path, mounts)
    number = int(hashlib.sha256(os.fsencode(folder)).hexdigest(), 16)
    return Job(
        hosts=names,
        name=f"pretrain-{re.sub('[^A-Za-z0-9]+', '-', folder.name).strip('-')[:40]}-{number % 16**6:06x}",
        folder=folder,
        image=_word("--image", args.image),
        processes=processes,
        gpus=args.gpus or 0,
        environment=environment_of(args.env),
        mounts=mounts,
        options=_options(args),
        user=_user(args.user),
        master=_word("--master", args.master or names[0].rpartition("@")[2]),
        port=args.port or PORTS[number % len(PORTS)],
        stop_seconds=args.stop_seconds,
        arguments=[
            *(args.config, *args.overrides),
            *([] if args.profile is None else [f"--profile={args.profile}"]),
        ],
    )


def hosts_of(names: str, exclude: str) -> list[str]:
    from launch.ssh import check_host

    hosts, without = ([name.strip() for name in text.split(",") if name.strip()] for text in (names, exclude))
    for name in hosts:
        check_host(name)
    if twice := sorted({name for name in hosts if hosts.count(name) > 1}):
        raise UserError(f"--hosts: {', '.join(twice)} twice; one container runs on each host")
    if strange := [name for name in without if name not in hosts]:
        raise UserError(f"--exclude: {', '.join(strange)} is not among --hosts")
    if left := [name for name in hosts if name not in without]:
        return left
    raise UserError("--hosts: no host is left")


def mount_of(text: str) -> Mount:
    """FOLDER[:TARGET][:ro]. Raises UserError."""
    from launch.job import Mount

    rest, readonly = text.removesuffix(":ro"), text.endswith(":ro")
    source, colon, target = rest.rpartition(":/")
    mount = Mount(source, f"/{target}", readonly) if colon else Mount(rest, rest, readonly)
    if not mount.source.startswith("/"):
        raise UserError(f"--mount: FOLDER[:TARGET][:ro] with whole paths, from /, not {text!r}")
    return mount


def _check_mounted(what: str, path: Path, mounts: Sequence[Mount]) -> None:
    if not any(Path(os.path.normpath(path)).is_relative_to(mount.target) for mount in mounts):
        raise UserError(
            f"{what}: {path} is in no folder that the containers have; start where it is below, or add --mount {path.parent}"
        )


def environment_of(words: Sequence[str]) -> dict[str, str]:
    """The variables of --env with their values. Raises UserError."""
    environment = {}
    for word in words:
        name, given, value = word.partition("=")
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env: NAME or NAME=VALUE, and {name!r} is no name of a variable")
        if name in OURS:
            raise UserError(f"--env: {name} is set by the launcher")
        if not given and name not in os.environ:
            raise UserError(f"--env: {name} is not set here; set it, or give {name}=VALUE")
        environment[name] = value if given else os.environ[name]
    return environment


def _options(args: argparse.Namespace) -> list[str]:
    options = [f"--device={_word('--device', path)}" for path in args.device]
    options.append(f"--shm-size={_word('--shm-size', args.shm_size)}")
    if args.gpus:
        options += [f"--gpus={args.gpus}", *FOR_GPUS]
    return options


def _user(text: str | None) -> str | None:
    if text is not None and not re.fullmatch("[0-9]+(:[0-9]+)?", text):
        raise UserError(f"--user: UID or UID:GID in numbers, since the image knows no other names, not {text!r}")
    return text


def _word(option: str, text: str) -> str:
    if not text or text.startswith("-") or not text.isprintable() or " " in text:
        raise UserError(f"{option}: {text!r} cannot be one")
    return text


def _show(job: Job, containers: Sequence[Container]) -> None:
    """What would run on each host, as a person could type it there; of the environment only names."""
    names = f"; set there: {', '.join(job.environment)}" if job.environment else ""
    print(
        f"# {len(job.hosts)} hosts, {job.processes} processes each; nothing was checked there, nothing was started{names}"
    )
    for container in containers:
        print(f"# on {container.host}:\n{container.run}")
