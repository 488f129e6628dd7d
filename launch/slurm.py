"""`python -m launch slurm`: a run as a job of Slurm's.

The job's script lies in RUN/launch/job.sh, beside a copy of the config, so that what runs is what was submitted, also when
the job is requeued a week later. launch/script.py has how it is made.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import arrays, attempts
from launch.opening import add_run_options, open_config, read_config
from pretrain.config.folder import CONFIG, LAUNCH, LOGS
from pretrain.errors import Exit, UserError

if TYPE_CHECKING:  # imported when the command runs, so that --help is there at once
    from launch.script import Job
    from pretrain.config.run import Config

EXAMPLE = "python -m launch slurm configs/gpt/demo.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 parallel.tensor=8"
SCRIPT = "job.sh"
SBATCH_OPTIONS = ("partition", "account", "qos", "constraint", "exclude", "memory")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`commands`: what argparse's add_subparsers gave."""
    slurm: argparse.ArgumentParser = commands.add_parser(
        "slurm",
        help="a job of Slurm",
        description="Write a batch script into RUN/launch and submit it. Before the time limit the run saves and the job is "
        "requeued; a job that fails is too, until it fails for good. `python -m launch status RUN` tells what became of it.",
        usage="python -m launch slurm CONFIG --nodes N --time T [options] [section.key=value ...]\n"
        "       python -m launch slurm DIR --tasks N --time T [options]",
        epilog=f"example: {EXAMPLE}",
    )
    add_run_options(slurm)
    _size_options(slurm)
    for name, text in (
        ("partition", "where it runs"),
        ("account", "who pays"),
        ("qos", "quality of service"),
        ("constraint", "features that the nodes must have"),
        ("exclude", "nodes that it must not have"),
    ):
        slurm.add_argument(f"--{name}", default="", metavar="NAME", help=f"{text}, as sbatch takes it")
    _environment_options(slurm)
    _attempt_options(slurm)
    return slurm


def _size_options(slurm: argparse.ArgumentParser) -> None:
    slurm.add_argument("--nodes", type=int, metavar="N", help="how many nodes")
    slurm.add_argument("--time", required=True, metavar="T", help="limit of each attempt, as sbatch takes it: 24:00:00")
    slurm.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="GPUs, and as many processes, a node")
    slurm.add_argument(
        "--processes-per-node", type=int, metavar="N", help="on nodes without GPUs: processes a node (default: 1)"
    )
    slurm.add_argument("--cpus", type=int, metavar="N", help="cores of a node (default: whole nodes)")
    slurm.add_argument("--memory", default="", metavar="SIZE", help="of a node, such as 64G (default: all, or Slurm's)")
    slurm.add_argument(
        "--direct", action="store_true", help="start each rank as a task of Slurm's, instead of one task a node"
    )


def _environment_options(slurm: argparse.ArgumentParser) -> None:
    slurm.add_argument("--setup", metavar="FILE", help="shell file to read before the start: modules, environments")
    slurm.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set a variable; NAME alone keeps its value here, and out of the script",
    )
    slurm.add_argument(
        "--container", choices=("docker", "pyxis"), default="none", help="run in --image, by docker or pyxis/enroot"
    )
    slurm.add_argument("--image", default="", metavar="IMAGE", help="with --container")


def _attempt_options(slurm: argparse.ArgumentParser) -> None:
    slurm.add_argument(
        "--tasks",
        type=int,
        metavar="N",
        help="of a folder that `pretrain prepare --plan` planned: an array that prepares it",
    )
    slurm.add_argument("--seeds", metavar="LIST", help="a job array: run.seed 1-4 or 1,5,7, each in RUN/seed-N")
    slurm.add_argument("--at-once", type=int, metavar="N", help="jobs of an array that may run at once (default: all)")
    slurm.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs one after the other, where no job may be requeued"
    )
    slurm.add_argument(
        "--stop-before",
        type=int,
        default=180,
        metavar="S",
        help="seconds before the limit at which the run is asked to save (default: 180)",
    )
    slurm.add_argument("--max-attempts", type=int, default=10, metavar="N", help="attempts that may fail (default: 10)")


def run(args: argparse.Namespace) -> int:
    """Check all that can be known, write the script, submit it; the exit code."""
    if args.tasks is not None:
        from launch import preparing

        return preparing.run(args)
    from launch.script import render

    if args.nodes is None:
        raise UserError("--nodes: how many are needed is not given")

    if args.gpus_per_node and args.processes_per_node not in (None, args.gpus_per_node):
        raise UserError("--processes-per-node: with GPUs there are as many processes a node as --gpus-per-node")
    processes = args.gpus_per_node or args.processes_per_node or 1
    job = _checked(args, processes)
    script = render(job)
    if args.dry_run:
        print(script, end="")
        return Exit.FINISHED
    check_slurm(job.run)
    _write(args.config, job, script)
    jobs = _submit(job)
    _note(job, jobs)
    print(f"job {', '.join(jobs)}: {job.run / LAUNCH / SCRIPT}, {job.nodes * processes} processes")
    print(f"  python -m launch status {shlex.quote(str(job.run))}")
    return Exit.FINISHED


def _checked(args: argparse.Namespace, processes: int) -> Job:
    """The job that the options describe. Raises UserError with all that is wrong with them."""
    from launch.script import Job, problems

    plan, planned_in = arrays.plan_in(Path(args.config)), Path(args.config).absolute()
    if plan is not None:
        args.config, args.overrides = plan.config, [*plan.overrides, *args.overrides]
    config = read_config(args.config, args.overrides)
    run = planned_in if plan is not None else Path(config.run.dir).absolute()
    members = arrays.of_plan(plan, run) if plan else arrays.of_seeds(args.seeds, run) if args.seeds else ()
    for words in [member.words for member in members] or [[]]:  # every mistake before the first run
        open_config(args.config, [*args.overrides, *words], max(1, args.nodes) * max(1, processes))
    job = Job(
        run=run,
        work=Path.cwd(),
        command=_command(args, run, processes),
        submission=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
        nodes=args.nodes,
        processes=processes,
        time=args.time,
        options={f"--{name}": value for name in SBATCH_OPTIONS if (value := getattr(args, name))},
        gpus=args.gpus_per_node,
        cpus=args.cpus,
        direct=args.direct,
        stop_before=args.stop_before,
        max_attempts=args.max_attempts,
        chain=args.chain,
        members=members,
        at_once=args.at_once,
        container=args.container,
        image=args.image,
        mounts=_mounts(args, config, run) if args.container != "none" else (),
        setup=Path(args.setup).absolute() if args.setup else None,
        environment=tuple(args.env),
    )
    found = [*problems(job), *_missing(args, job, planned=plan is not None)]
    if found:
        raise UserError("\n".join(["this job cannot be submitted:", *(f"  {problem}" for problem in found)]))
    return job


def _missing(args: argparse.Namespace, job: Job, planned: bool) -> list[str]:
    """What is not there, and what does not go together."""
    found = [
        f"--env {name}: is not set here, so there is no value to keep; give {name}=VALUE"
        for name in args.env
        if "=" not in name and name not in os.environ
    ]
    if job.setup is not None and not job.setup.is_file():
        found.append(f"--setup: {args.setup}: there is no such file")
    if args.seeds and planned:
        found.append("--seeds: the sweep has planned its seeds; leave it out")
    elif args.seeds and job.run.exists() and not arrays.is_home(job.run):
        found.append(f"--seeds: {job.run} holds other files than seeds; name a new folder for all of them (run.dir)")
    if job.members and args.chain > 1:
        found.append("--chain: an array is no chain; leave it out")
    if args.at_once is not None and not job.members:
        found.append("--at-once: is for arrays (--seeds, or a sweep's folder)")
    return found


def _command(args: argparse.Namespace, run: Path, processes: int) -> tuple[str, ...]:
    """A task's: the ranks of a node, or with --direct one."""
    python = sys.executable if args.container == "none" else "python"
    config = args.config if Path(args.config).is_dir() else str(run / LAUNCH / CONFIG)
    program = (
        ("pretrain", "train", config) if args.direct else ("launch", "node", config, "--processes", str(processes))
    )
    return (python, "-m", *program, *args.overrides)


def _mounts(args: argparse.Namespace, config: Config, run: Path) -> tuple[Path, ...]:
    """Folders that the run reads and writes, each at its own place in the container; none inside another."""
    data = config.data
    validation = data.validation if isinstance(data.validation, list) else [data.validation]
    named = [*data.train_folders, *data.held_out.values(), *validation, config.model.initial]
    paths = [Path(name).absolute() for name in named if name is not None and Path(name).exists()]
    folders = {path if path.is_dir() else path.parent for path in [*paths, Path.cwd(), run]}
    return tuple(sorted(one for one in folders if not any(other in one.parents for other in folders)))


def check_slurm(run: Path) -> None:
    """Raises UserError where nothing can be submitted, or a job has the folder."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; submit where Slurm's commands are (--dry-run shows the script anywhere)")
    from launch.queue import live

    submitted = [one for line in attempts.read(run) if line["event"] == "submitted" for one in line["jobs"]]
    if running := live(submitted):
        raise UserError(f"run.dir: {run} is in the hands of job {', '.join(running)} (scancel it, or wait)")


def _write(source: str, job: Job, script: str) -> None:
    """Script and config; readable by their owner alone."""
    folder = job.run / LAUNCH
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (job.run / LOGS).mkdir(exist_ok=True)  # Slurm makes no folder, and a job that cannot write ends without a word
        if not Path(source).is_dir():
            write_whole(folder / CONFIG, Path(source).read_text(), 0o600)
        write_whole(folder / SCRIPT, script, 0o700)
    except OSError as error:
        raise UserError(f"run.dir: {folder} cannot be written: {error.strerror}") from error


def write_whole(path: Path, text: str, mode: int) -> None:
    """A file of this mode, there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(partial, path)


def _submit(job: Job) -> list[str]:
    """The numbers of the submitted jobs: one, or those of a chain, each after the one before."""
    jobs: list[str] = []
    for _ in range(job.chain):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(sbatch([*after, f"--chdir={job.run}", str(job.run / LAUNCH / SCRIPT)]))
    return jobs


def _note(job: Job, jobs: list[str]) -> None:
    """In each run's folder, which jobs are its own."""
    shared = {"submission": job.submission, "logs": str(job.run / LOGS)}
    attempts.note(job.run, "submitted", jobs=jobs, **shared)
    for member in job.members:
        attempts.note(member.folder, "submitted", jobs=[f"{jobs[0]}_{member.number}"], **shared)


def sbatch(arguments: Sequence[str]) -> str:
    """The job's number. Without a shell, so that no path is read as anything else."""
    result = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"sbatch: {result.stderr.strip() or f'exit code {result.returncode}'}")
    return result.stdout.strip().partition(";")[0]
