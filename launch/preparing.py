"""`python -m launch slurm DIR --tasks N`: a folder of shards that `prepare --plan` has planned, as jobs of Slurm's.

An array of N tasks does the pieces; when all have ended well (afterok) one job makes the shards. Each is a short script in
DIR's draft, beside the plan. What a task has done is never done again, so a job that failed is submitted by the same command.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch import attempts
from launch.script import Job, job_name, problems, surroundings
from pretrain.config.folder import LAUNCH, LOGS, PLAN, draft_of
from pretrain.errors import Exit, UserError

MOST = 10_000  # tasks of an array
SBATCH_OPTIONS = ("partition", "account", "qos", "constraint", "exclude", "memory")
IDLE = (
    "nodes",
    "gpus_per_node",
    "processes_per_node",
    "direct",
    "seeds",
    "container",
    "image",
    "overrides",
)  # what a run alone has
IDLE_DEFAULTS = {"gpus_per_node": 0, "container": "none", "chain": 1, "stop_before": 180, "max_attempts": 10}


@dataclass(frozen=True)
class Step:
    """A job, or an array of `tasks` jobs, of which each does `words` of prepare's."""

    name: str
    words: tuple[str, ...]
    tasks: int = 0  # of an array; 0: one job

    @property
    def script(self) -> str:
        return f"{self.name}.sh"


def steps(plan: Path, tasks: int) -> list[Step]:
    """What the plan needs, each when the one before has ended well."""
    try:
        compares = bool(json.loads(plan.read_bytes()).get("compares"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{plan}: is no plan of prepare: {error}") from None
    share = ("--task", "$SLURM_ARRAY_TASK_ID", "--tasks", str(tasks))
    before = [Step("sign", (*share, "--stage", "sign"), tasks), Step("cluster", ("--cluster",))] if compares else []
    return [*before, Step("encode", share, tasks), Step("merge", ("--merge",))]


def run(args: argparse.Namespace) -> int:
    """Check all that can be known, write the scripts, submit them; the exit code."""
    out = Path(args.config).absolute()
    draft = draft_of(out)
    job = _checked(args, draft)
    found = steps(draft / PLAN, args.tasks)
    scripts = {step: render(step, job, out) for step in found}
    if args.dry_run:
        print("\n".join(f"# {step.script}\n{script}" for step, script in scripts.items()), end="")
        return Exit.FINISHED
    from launch.slurm import check_slurm, sbatch, write_whole

    check_slurm(draft)
    try:
        for folder in (draft / LAUNCH, draft / LOGS):
            folder.mkdir(exist_ok=True)
        for step, script in scripts.items():
            write_whole(draft / LAUNCH / step.script, script, 0o700)
    except OSError as error:
        raise UserError(f"{draft} cannot be written: {error.strerror}") from error
    jobs: list[str] = []
    for step in found:
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        jobs.append(sbatch([*after, f"--chdir={draft}", str(draft / LAUNCH / step.script)]))
        attempts.note(draft, "submitted", jobs=[jobs[-1]], submission=job.submission, logs=str(draft / LOGS))
    for step, number in zip(found, jobs, strict=True):
        print(f"job {number}: {step.name}{f', {step.tasks} tasks' if step.tasks else ''}")
    print(f"  logs in {draft / LOGS}; {out} is there when the last has ended")
    return Exit.FINISHED


def _checked(args: argparse.Namespace, draft: Path) -> Job:
    """What the scripts have in common, in a run's terms. Raises UserError with all that is wrong."""
    if not (draft / PLAN).is_file():
        raise UserError(
            f"--tasks: {args.config} is no folder that `python -m pretrain prepare TEXT... --out DIR --plan` planned"
        )
    job = Job(
        run=draft,
        work=Path.cwd(),
        command=(),
        submission=time.strftime("%Y%m%d-%H%M%S"),
        nodes=1,
        processes=1,
        time=args.time,
        options={f"--{name}": value for name in SBATCH_OPTIONS if (value := getattr(args, name))},
        cpus=args.cpus,
        stop_before=1,
        at_once=args.at_once,
        setup=Path(args.setup).absolute() if args.setup else None,
        environment=tuple(args.env),
    )
    found = list(problems(job))
    if not 1 <= args.tasks <= MOST:
        found.append(f"--tasks: 1 to {MOST:,}, not {args.tasks}")
    if job.setup is not None and not job.setup.is_file():
        found.append(f"--setup: {args.setup}: there is no such file")
    idle = [
        name
        for name in (*IDLE, *IDLE_DEFAULTS)
        if getattr(args, name) not in (None, [], False, "", IDLE_DEFAULTS.get(name))
    ]
    found += [f"{name}: is of a run, not of --tasks; leave it out" for name in dict.fromkeys(map(_spelled, idle))]
    if found:
        raise UserError("\n".join(["these jobs cannot be submitted:", *(f"  {problem}" for problem in found)]))
    return job


def _spelled(name: str) -> str:
    return "section.key=value" if name == "overrides" else f"--{name.replace('_', '-')}"


def render(step: Step, job: Job, out: Path) -> str:
    """A step's script. sbatch stops reading directives at the first command, so that no value can bring in another."""
    return "\n".join(["#!/bin/bash", *_directives(step, job, out), "", *_body(step, job, out)]) + "\n"


def _directives(step: Step, job: Job, out: Path) -> Iterator[str]:
    given = {
        "--job-name": f"{job_name(out)}-{step.name}",
        "--nodes": 1,
        "--ntasks": 1,
        "--time": job.time,
        "--cpus-per-task": job.cpus or "",
        **{name: value for name, value in job.options.items() if name != "--memory"},
        "--mem": job.options.get("--memory") or ("0" if job.cpus is None else ""),
        "--array": f"0-{step.tasks - 1}{f'%{job.at_once}' if job.at_once else ''}" if step.tasks else "",
        "--output": f"{LOGS}/{step.name}-{'%A_%a' if step.tasks else '%j'}.out",  # of --chdir
        "--open-mode": "append",
    }
    yield from (f"#SBATCH {name}={value}" for name, value in given.items() if value != "")
    yield "#SBATCH --requeue"
    if job.cpus is None:
        yield "#SBATCH --exclusive"


def _body(step: Step, job: Job, out: Path) -> Iterator[str]:
    yield from surroundings(job)
    yield f"cd -- {shlex.quote(str(job.work))}"
    processes = ("--processes", str(job.cpus)) if job.cpus else ()
    command = [sys.executable, "-m", "pretrain", "prepare", "--out", str(out), *step.words, *processes]
    yield "exec " + " ".join(f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in command)
