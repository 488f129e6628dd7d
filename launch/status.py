"""`python -m launch status RUN`: how a run stands, from Slurm where it is there, and from the run's folder.

Works for runs of every launcher, from any machine that sees the folder, also while they train: it only reads.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch import attempts
from launch.queue import ended, queued
from pretrain.config.folder import CHECKPOINTS, CONFIG, LOGS, METRICS, SUMMARY
from pretrain.errors import Exit, UserError

EXAMPLE = "python -m launch status runs/demo"
TAIL = 256 * 1024  # bytes of the metrics that are read: the newest lines

Fields = dict[str, Any]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`commands`: what argparse's add_subparsers gave."""
    status: argparse.ArgumentParser = commands.add_parser(
        "status",
        help="how runs stand",
        description="State, step, speed, last checkpoint and attempts of runs, with the commands to watch them. A folder "
        "of seeds or of a sweep stands for all of them.",
        epilog=f"example: {EXAMPLE}",
    )
    status.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    status.add_argument("--json", action="store_true", help="one JSON object a run and line")
    return status


def run(args: argparse.Namespace) -> int:
    """Tell of each run; returns the exit code."""
    for name in args.runs:
        if not Path(name).is_dir():
            raise UserError(f"{name}: there is no such folder")
    for number, folder in enumerate(one for name in args.runs for one in runs_in(Path(name))):
        found = status_of(folder)
        if args.json:
            print(json.dumps(found))
        else:
            print(*([""] if number else []), *told(found), sep="\n")
    return Exit.FINISHED


def runs_in(folder: Path) -> list[Path]:
    """The folder, or those of its seeds or trials."""
    members = [*folder.glob("seed-*"), *folder.glob("trials/*/run")]
    members.sort(key=lambda path: (len(str(path)), path))
    return members if members and not (folder / CONFIG).exists() else [folder]


def status_of(folder: Path) -> Fields:
    """All that is known of a run."""
    lines, now = attempts.read(folder), time.time()
    found = attempts_of(lines)
    log = _log(folder, lines, found)
    return {
        "run": str(folder),
        **_state(folder, lines, found),
        **_progress(folder, now),
        "total_steps": _total_steps(folder),
        "checkpoint": _checkpoint(folder, now),
        "attempts": found,
        "tensorboard": f"python -m pretrain tensorboard {shlex.quote(str(folder))}",
        "tail": f"tail -F {shlex.quote(str(log))}",
    }


# -- what the folder says ----------------------------------------------------------------------------------------------


def attempts_of(lines: list[Fields]) -> list[Fields]:
    """Each attempt with its begin and, where it had the time to say it, its end."""
    found: list[Fields] = []
    for line in lines:
        key = [line.get(name) for name in ("submission", "job", "attempt", "pid", "born")]
        if line["event"] == "begin":
            found.append(_named(line, "begin") | {"key": key, "end": None, "why": None})
        elif line["event"] == "end" and found and found[-1]["key"] == key:
            found[-1] |= _named(line, "end") | {name: line.get(name) for name in ("code", "why", "next")}
    for one in found:
        del one["key"]
    return found


def _named(line: Fields, event: str) -> Fields:
    shared: Fields = {name: line[name] for name in ("job", "nodes", "pid", "born") if name in line}
    return {**shared, event: line.get("time"), f"{event}_step": line.get("step")}


def _progress(folder: Path, now: float) -> Fields:
    """Of the last logged step."""
    found: Fields = {
        "step": 0,
        "loss": None,
        "validation_loss": None,
        "per_second": None,
        "unit": None,
        "silent_seconds": None,
    }
    path = folder / METRICS
    if not path.is_file():
        return found
    for line in _last_lines(path):
        if isinstance(line.get("loss"), float):
            found |= {"step": line["step"], "loss": line["loss"]}
        for unit in ("tokens", "examples"):
            if f"{unit}_per_second" in line:
                found |= {"per_second": line[f"{unit}_per_second"], "unit": unit}
        if "validation_loss" in line:
            found["validation_loss"] = line["validation_loss"]
    return found | {"silent_seconds": round(now - path.stat().st_mtime)}


def _last_lines(path: Path) -> Iterator[Fields]:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        for text in file.read().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut off at its begin, or being written
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line


def _checkpoint(folder: Path, now: float) -> Fields | None:
    step = attempts.newest_step(folder)
    if not step:
        return None
    path = folder / CHECKPOINTS / f"step-{step:08d}"
    age = round(now - path.stat().st_mtime) if path.is_dir() else None
    return {"step": step, "seconds": age, "path": str(path)}


def _total_steps(folder: Path) -> int | None:
    """Where the schedule counts steps."""
    if not (folder / CONFIG).is_file():
        return None
    from pretrain.config.load import load_config

    try:
        total = load_config(folder / CONFIG).schedule.total
    except UserError:  # of another version: all else can be told yet
        return None
    return int(total.count) if total.unit == "steps" else None


def _log(folder: Path, lines: list[Fields], found: list[Fields]) -> Path:
    """What there is to watch: a job's output, or the metrics of a run whose output went to a terminal."""
    job = str(found[-1]["job"]) if found else ""
    if not job.replace("_", "").isdecimal():
        return folder / METRICS
    logs = [line["logs"] for line in lines if isinstance(line.get("logs"), str)]  # an array's are one folder
    return Path(logs[-1] if logs else folder / LOGS) / f"slurm-{job}.out"


# -- the state ---------------------------------------------------------------------------------------------------------


def _state(folder: Path, lines: list[Fields], found: list[Fields]) -> Fields:
    """In one word, with what explains it."""
    jobs = _jobs(lines)
    last = found[-1] if found else None
    running = sorted((one for one in queued(jobs) if one.job in jobs), key=lambda one: one.state != "RUNNING")
    if running:
        one = running[0]
        reason = one.nodes if one.state == "RUNNING" else one.reason
        return {"state": one.state.lower(), "reason": reason, "job": one.job}
    if last is None:
        return {**_unwatched(folder), "job": jobs[-1] if jobs else None}
    job = str(last["job"])
    if last["end"] is not None:
        return {"state": last["why"], "reason": "", "job": job}
    if job == "local":
        return {**_local(last), "job": job}
    how = ended(job)
    return {"state": how or "lost", "reason": "" if how else "its job is not in the queue, and said no end", "job": job}


def _jobs(lines: list[Fields]) -> list[str]:
    """Those of the last submission."""
    submitted = [line for line in lines if line["event"] == "submitted"]
    jobs = submitted[-1].get("jobs") if submitted else None
    return [job for job in jobs if isinstance(job, str)] if isinstance(jobs, list) else []


def _local(last: Fields) -> Fields:
    if last["nodes"] != platform.node():
        return {"state": "unknown", "reason": f"it was started on {last['nodes']}: ask there"}
    alive = last["born"] and attempts.born(last["pid"]) == last["born"]
    return {"state": "running", "reason": f"process {last['pid']}"} if alive else {"state": "killed", "reason": ""}


def _unwatched(folder: Path) -> Fields:
    """A run that no launcher started."""
    try:
        reason = json.loads((folder / SUMMARY).read_text()).get("reason")
    except (OSError, ValueError, AttributeError):
        reason = None
    if reason:
        return {"state": str(reason), "reason": ""}
    if (folder / METRICS).is_file():
        return {"state": "unknown", "reason": "no launcher started it, and it has not ended"}
    return {"state": "not started", "reason": ""}


# -- telling -----------------------------------------------------------------------------------------------------------


def told(found: Fields) -> Iterator[str]:
    """For people."""
    job = f" (job {found['job']})" if found["job"] and found["job"] != "local" else ""
    why = f", {found['reason']}" if found["reason"] else ""
    yield f"{found['run']}: {found['state']}{job}{why}"
    of = f" of {found['total_steps']:,}" if found["total_steps"] else ""
    yield "  " + ", ".join([f"step {found['step']:,}{of}", *_numbers(found)])
    saved = found["checkpoint"]
    yield f"  last checkpoint: step {saved['step']:,}, {ago(saved['seconds'])}" if saved else "  no checkpoint yet"
    for number, one in enumerate(found["attempts"], start=1):
        last = number == len(found["attempts"])
        unsaid = found["state"] if last else "no end was said: its node died, or it was killed"
        yield f"  attempt {number}: {_attempt(one, unsaid)}"
    yield f"  {found['tensorboard']}"
    yield f"  {found['tail']}"


def _numbers(found: Fields) -> Iterator[str]:
    if found["loss"] is not None:
        yield f"loss {found['loss']:.4f}"
    if found["validation_loss"] is not None:
        yield f"validation loss {found['validation_loss']:.4f}"
    if found["per_second"] is not None:
        yield f"{found['per_second']:,.0f} {found['unit']}/s"
    if found["silent_seconds"] is not None:
        yield f"logged {ago(found['silent_seconds'])}"


def _attempt(one: Fields, unsaid: str) -> str:
    """unsaid: what is told of one that has not ended, or not with a word."""
    where = "" if one["job"] == "local" else f"job {one['job']} on {one['nodes']}, "
    begun = time.strftime("%m-%d %H:%M", time.localtime(one["begin"]))
    if one["end"] is None:
        return f"{where}{begun}, from step {one['begin_step']}: {unsaid}"
    steps, took = f"step {one['begin_step']} to {one['end_step']}", clock(one["end"] - one["begin"])
    follows = "" if one["next"] in (None, "none") else f"; then {one['next']}"
    return f"{where}{begun}, {took}, {steps}: {one['why']} (exit code {one['code']}){follows}"


def clock(seconds: float) -> str:
    """1:02:03"""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def ago(seconds: float | None) -> str:
    return "at an unknown time" if seconds is None else f"{clock(max(0, seconds))} ago"
