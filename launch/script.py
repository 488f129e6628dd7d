"""The batch script of a Slurm job: directives, the run's settings, and what every job does (launch/templates/job.sh).

Nothing can be quoted in an #SBATCH line, so what stands there is checked to be harmless (`problems`). All else is a
setting, quoted for bash. sbatch stops reading directives at the first command, so that no value can bring in another.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from launch.arrays import Member, spelled
from launch.limits import CONFINED, FOR_GPUS, SHARED, SHM_SIZE
from pretrain.config.folder import LOGS

BODY = "templates/job.sh"
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d\d?))?(?::(?P<third>\d\d?))?")
ALLOWED = {
    "--partition": r"[\w.,@+-]+",
    "--account": r"[\w.,@+-]+",
    "--qos": r"[\w.,@+-]+",
    "--constraint": r"[\w.,@+&|*()\[\]!:-]+",
    "--exclude": r"[\w.,\[\]-]+",
    "--memory": r"\d+[KMGT]?",
}
NAME = r"[A-Za-z_][A-Za-z0-9_]*"  # of an environment variable


@dataclass(frozen=True)
class Job:
    """What a script is made of. The strings of `options` are sbatch's, by the option's name; empty: not given."""

    run: Path  # absolute
    work: Path  # where it was submitted from, absolute
    command: tuple[str, ...]  # of a task
    submission: str
    nodes: int
    processes: int  # on each node
    time: str
    options: dict[str, str] = field(default_factory=dict)  # of ALLOWED
    gpus: int = 0  # on each node
    cpus: int | None = None  # on each node; None: whole nodes
    direct: bool = False  # a task a rank
    stop_before: int = 180  # seconds
    max_attempts: int = 10
    chain: int = 1
    members: tuple[Member, ...] = ()  # of an array; empty: one run
    at_once: int | None = None  # of these
    container: str = "none"
    image: str = ""
    mounts: tuple[Path, ...] = ()
    setup: Path | None = None
    environment: tuple[str, ...] = ()  # NAME=VALUE, or NAME: the submitter's own value, which is written nowhere

    @property
    def tasks(self) -> int:
        """On each node."""
        return self.processes if self.direct else 1


def problems(job: Job) -> Iterator[str]:
    """What is wrong with what the user gave."""
    for name, value in job.options.items():
        if not re.fullmatch(ALLOWED[name], value, re.ASCII):
            yield f"{name}: {value!r} is not of the form that Slurm takes"
    limit = seconds(job.time)
    if limit is None:
        yield f"--time: {job.time!r} is no time limit; write minutes, hours:minutes:seconds or days-hours:minutes"
    elif limit <= job.stop_before:
        yield f"--time: {job.time} leaves nothing before the last {job.stop_before} s, in which the run saves (--stop-before)"
    for variable in job.environment:
        if not re.fullmatch(NAME, variable.partition("=")[0]):
            yield f"--env: {variable.partition('=')[0]!r} is no name of a variable"
    counts = {"--nodes": job.nodes, "--processes-per-node": job.processes, "--max-attempts": job.max_attempts}
    counts |= {"--chain": job.chain, "--stop-before": job.stop_before}
    counts |= {} if job.at_once is None else {"--at-once": job.at_once}
    yield from (f"{name}: at least 1, not {count}" for name, count in counts.items() if count < 1)
    if job.cpus is not None and (job.cpus < job.processes or job.cpus % job.tasks):
        yield f"--cpus: {job.cpus} cores cannot be shared out to the {job.processes} processes of a node"
    if found := re.search(r"[%\\]", str(job.run)):  # it puts --chdir before the name of the log, and reads all of it
        yield f"run.dir: Slurm reads {found[0]} in {str(job.run)!r} as its own sign; choose a name without it"
    yield from _container_problems(job)


def _container_problems(job: Job) -> Iterator[str]:
    if (job.container == "none") == bool(job.image):
        yield "--container and --image belong together: give both or none"
    if job.image.startswith("-") or not job.image.isprintable():
        yield f"--image: {job.image!r} is no image"
    if job.container == "none":
        return
    for folder in job.mounts:
        if re.search(r"[,:\"\n]", str(folder)):
            yield f"--container: {str(folder)!r} cannot be mounted: no name may hold a comma, a colon, a quote or a line's end"


def seconds(text: str) -> int | None:
    """Of a time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. None where it is none."""
    found = TIME.fullmatch(text)
    if found is None or not text.isascii():
        return None
    parts = [int(part) for part in (found["first"], found["second"], found["third"]) if part is not None]
    if found["days"] is not None or len(parts) == 3:
        hours, minutes, rest = (*parts, 0, 0)[:3]
    else:
        hours, (minutes, rest) = 0, (*parts, 0)[:2]
    return int(found["days"] or 0) * 86_400 + hours * 3_600 + minutes * 60 + rest


def render(job: Job) -> str:
    """The whole script."""
    body = files("launch").joinpath(BODY).read_text(encoding="utf-8")
    lines = ["#!/bin/bash", *_directives(job), "", *_settings(job), "", body.rstrip("\n")]
    return "\n".join(lines) + "\n"


def job_name(run: Path) -> str:
    """The run's folder, of the characters that no shell and no Slurm makes anything of."""
    return re.sub(r"[^\w.-]+", "_", run.name, flags=re.ASCII)[:64].lstrip("-") or "run"


def _directives(job: Job) -> Iterator[str]:
    yield "# Written by `python -m launch slurm`, which also submits it. By hand: sbatch --chdir=RUN RUN/launch/job.sh"
    given = {
        "--job-name": job_name(job.run),
        "--nodes": job.nodes,
        "--ntasks-per-node": job.tasks,
        "--time": job.time,
        "--gpus-per-node": job.gpus or "",
        "--cpus-per-task": "" if job.cpus is None else job.cpus // job.tasks,
        **{name: value for name, value in job.options.items() if name != "--memory"},
        "--mem": job.options.get("--memory") or ("0" if job.cpus is None else ""),
        "--array": spelled(job.members, job.at_once) if job.members else "",
        "--output": f"{LOGS}/slurm-{'%A_%a' if job.members else '%j'}.out",  # of --chdir
        "--signal": f"B:USR1@{job.stop_before}",
    }
    yield from (f"#SBATCH {name}={value}" for name, value in given.items() if value != "")
    yield "#SBATCH --open-mode=append"
    yield "#SBATCH --no-requeue" if job.chain > 1 else "#SBATCH --requeue"
    if job.cpus is None:
        yield "#SBATCH --exclusive"


def surroundings(job: Job) -> Iterator[str]:
    """Lines that set the variables that were asked for, and read the user's own file."""
    for variable in job.environment:
        name, equals, value = variable.partition("=")
        yield (
            f"export {name}={shlex.quote(value)}"
            if equals
            else f"export {name} # as it was where the job was submitted"
        )
    if job.setup is not None:
        yield f"source {shlex.quote(str(job.setup))} || exit"
    yield "set -euo pipefail"


def _settings(job: Job) -> Iterator[str]:
    yield "# -- this run"
    yield from surroundings(job)
    settings = {
        "run": str(job.run),
        "work": str(job.work),
        "submission": job.submission,
        "container": job.container,
        "image": job.image,
    }
    numbers = {"direct": int(job.direct), "gpus": job.gpus, "tasks_per_node": job.tasks}
    numbers |= {"stop_before": job.stop_before, "max_attempts": job.max_attempts, "chained": int(job.chain > 1)}
    yield from (f"{name}={shlex.quote(value)}" for name, value in settings.items())
    yield from (f"{name}={value}" for name, value in numbers.items())
    yield f"names=({shlex.join(variable.partition('=')[0] for variable in job.environment)})"
    yield f"mounts=({shlex.join(map(str, job.mounts))})"
    if job.container == "docker":
        memory = SHARED if job.direct else f"--shm-size={SHM_SIZE}"
        yield f"docker_options=({shlex.join([*CONFINED, memory, *(FOR_GPUS if job.gpus else ())])})"
    yield f"command=({_wrapped(job.command)})"
    if job.members:
        yield from _members(job.members)


def _members(members: Sequence[Member]) -> Iterator[str]:
    yield "member() { # NUMBER of the array's: its folder, and what is its own"
    yield "    case $1 in"
    for member in members:
        yield f"        {member.number}) run={shlex.quote(str(member.folder))} command+=({shlex.join(member.words)}) ;;"
    yield '        *) die "$1 is none of this array" ;;'
    yield "    esac"
    yield "}"


def _wrapped(words: Sequence[str]) -> str:
    """A word a line, where there are many."""
    return shlex.join(words) if len(words) < 4 else "\n    " + "\n    ".join(map(shlex.quote, words)) + "\n"
