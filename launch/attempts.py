"""What became of a run, in RUN/launch/attempts.jsonl: each attempt's begin and end, one JSON object a line.

Jobs of Slurm write it too, from their script (launch/templates/job.sh), where there may be no Python:

    {"event": "submitted", "submission": "20261128-041500-3f2a", "jobs": ["12"], "time": 1795839300}
    {"event": "begin", "submission": "20261128-041500-3f2a", "job": "12", "attempt": 1, "time": ..., "step": 0, "nodes": "n[1-2]"}
    {"event": "end", ..., "step": 40, "new": 40, "code": 75, "why": "time limit", "next": "requeue"}

`step` is that of the newest checkpoint, `new` the steps of the attempt that a checkpoint keeps, `next` what follows:
requeue, chain (the next job of a chain), slurm (it decides, as after a preemption), or none.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.config.folder import CHECKPOINTS, LAUNCH
from pretrain.errors import Exit

WORDS = {
    Exit.FINISHED: "finished",
    Exit.FAILED: "failed",
    Exit.MISTAKE: "a mistake",
    Exit.PARTED: "a rank died or did not answer",
    Exit.DIVERGED: "diverged",
    Exit.UNFIT: "a host was not fit",
    Exit.STOPPED: "asked to stop",
    Exit.INTERRUPTED: "interrupted",
}


def path_of(run: Path) -> Path:
    return run / LAUNCH / "attempts.jsonl"


def note(run: Path, event: str, **fields: Any) -> None:
    """Add a line, with the time."""
    path = path_of(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, **fields, "time": int(time.time())}) + "\n")


def read(run: Path) -> list[dict[str, Any]]:
    """The lines, oldest first; one that was not written whole is left out."""
    found = []
    try:
        text = path_of(run).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if isinstance(fields, dict) and isinstance(fields.get("event"), str):
            found.append(fields)
    return found


def newest_step(run: Path) -> int:
    """Of the run's checkpoints, by their folders' names; 0 where there is none."""
    names = [path.name.removeprefix("step-") for path in (run / CHECKPOINTS).glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def recorded(run: Path, wait: Callable[[], int]) -> int:
    """`wait()`, which gives the exit code of an attempt on this machine, with its begin and end noted."""
    before = newest_step(run)
    here = {"job": "local", "pid": os.getpid(), "born": born(os.getpid()), "nodes": platform.node()}
    note(run, "begin", **here, step=before)
    code = wait()
    after = newest_step(run)
    note(run, "end", **here, step=after, new=after - before, code=code, why=why(code), next="none")
    return code


def why(code: int) -> str:
    """An exit code in words."""
    if code in WORDS:
        return WORDS[Exit(code)]
    return f"killed by signal {code - 128}" if code > 128 else f"exit code {code}"


def born(pid: int) -> str:
    """When a process began, by the kernel's clock: with it a process id names one process for ever. Empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
