"""What Slurm says of jobs: squeue of those that live, sacct, where the cluster keeps accounts, of those that do not."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

SECONDS = 20  # a controller that does not answer for so long is as if it was not there
JOB = r"\d+(_\d+)?"  # as attempts.jsonl has them; what is no job of ours is not passed on


class Queued(NamedTuple):
    """A job, or a task of an array, in squeue's words."""

    job: str
    state: str
    reason: str
    nodes: str


def queued(jobs: Sequence[str]) -> list[Queued]:
    """Of these jobs, those that wait or run; empty where there is no Slurm."""
    numbers = _numbers(jobs)
    # Two ids, or squeue takes one that it has forgotten for a mistake.
    said = (
        _ask(["squeue", "--array", "--noheader", f"--jobs={','.join([*numbers, '1'])}", "--format=%F|%i|%T|%r|%N"])
        if numbers
        else ""
    )
    rows = [line.split("|", 4) for line in said.splitlines()]
    return [Queued(*row[1:]) for row in rows if len(row) == 5 and row[0] in numbers]


def live(jobs: Sequence[str]) -> list[str]:
    """The ids, as squeue has them, of these jobs that wait or run."""
    return [one.job for one in queued(jobs)]


def ended(job: str) -> str:
    """How a job ended, in sacct's words in small letters, such as node_fail; empty where nothing is known."""
    if not re.fullmatch(JOB, job):
        return ""
    said = _ask(["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={job}", "--format=State"])
    return said.split()[0].lower() if said.split() else ""


def _numbers(jobs: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(job.partition("_")[0] for job in jobs if re.fullmatch(JOB, job)))


def _ask(command: Sequence[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
