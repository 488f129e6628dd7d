"""`python -m launch local`: a run on this machine, one `python -m pretrain train` a rank (launch/ranks.py watches them)."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from launch.attempts import recorded
from launch.opening import add_run_options, open_config
from pretrain.config.folder import LOGS
from pretrain.config.profile import add_profile_option
from pretrain.errors import UserError

EXAMPLE = "python -m launch local configs/gpt/demo.yaml --processes 4 parallel.tensor=2 parallel.pipeline=2"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`commands`: what argparse's add_subparsers gave."""
    local: argparse.ArgumentParser = commands.add_parser(
        "local",
        help="processes on this machine",
        description="Train on processes of this machine. Rank 0 writes here, the others to RUN/logs/rank-N.log. "
        "Ctrl-C saves and ends; the same command goes on.",
        usage="python -m launch local CONFIG --processes N [--dry-run] [--profile [N]] [section.key=value ...]",
        epilog=f"example: {EXAMPLE}",
    )
    add_run_options(local)
    local.add_argument("--processes", type=int, required=True, metavar="N", help="how many: tensor x pipeline x data")
    add_profile_option(local)
    return local


def run(args: argparse.Namespace) -> int:
    """Check, start the ranks and wait; returns the exit code of the rank that failed first, or 0.

    Raises UserError, before anything starts, for whatever can be known now.
    """
    processes = args.processes
    if processes < 1:
        raise UserError(f"--processes: at least 1, not {processes}")
    config = open_config(args.config, args.overrides, processes)
    from launch.ranks import Ranks, say
    from parallel.layout import Layout

    options = [] if args.profile is None else [f"--profile={args.profile}"]
    command = [sys.executable, "-m", "pretrain", "train", args.config, *args.overrides, *options]
    environments = environments_of(processes)
    layout = Layout.of(config.parallel, processes)
    if args.dry_run:
        show(command, environments, layout)
        return 0
    threads, logs = environments[0]["OMP_NUM_THREADS"], Path(config.run.dir) / LOGS
    others = f"; other ranks write to {logs}" if processes > 1 else ""
    say(f"{processes} processes, OMP_NUM_THREADS={threads}: {layout}{others}")
    return recorded(Path(config.run.dir), Ranks(command, environments, logs).wait)


def environments_of(processes: int) -> list[dict[str, str]]:
    """The variables that torch.distributed reads, for each rank. A user's OMP_NUM_THREADS stays."""
    from parallel.ports import free_port

    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
        # torch's store warns with a stack of C++ frames when rank 0 is gone.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL") or "ERROR",
    }
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(processes)]


def show(command: list[str], environments: list[dict[str, str]], layout: object) -> None:
    print(f"# {len(environments)} processes, {layout}; nothing was started")
    for environment in environments:
        print(" ".join(f"{name}={value}" for name, value in environment.items()), shlex.join(command))
