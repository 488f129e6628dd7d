"""The option --profile of `train` and of the launcher, `monitor.profile_steps`, and the runs that are too short for them."""

from __future__ import annotations

import argparse

from pretrain.errors import UserError

DEFAULT = 5  # steps that are measured
MOST = 20  # steps of monitor.profile_steps: each is megabytes of trace
WARM_UP = 3  # steps before them: the first compiles, and through the last the profiler itself warms up


def add_profile_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        nargs="?",
        type=_steps,
        const=DEFAULT,
        metavar="N",
        help=f"after {WARM_UP} steps to warm up measure N (default: {DEFAULT}), print where their time went, write a "
        "trace into the run's folder, and go on",
    )


def check_profile(steps: int, left: int) -> None:
    """Raises UserError where `left` steps of a run are too few to measure `steps`."""
    if WARM_UP + steps > left:
        most = f"give at most {left - WARM_UP}, or a longer run" if left > WARM_UP else "give a longer run"
        raise UserError(
            f"--profile: {steps} steps after {WARM_UP} to warm up are {WARM_UP + steps}, but the run has only {left} to go "
            f"(schedule.total): {most}"
        )


def check_profiled(first: int | None, steps: list[int] | None, total: int) -> None:
    """The same for a run of so many steps that begins. first: of --profile; steps: `monitor.profile_steps`."""
    if first is not None and steps is not None:
        raise UserError("--profile: monitor.profile_steps names steps too; give one of them")
    if first is not None:
        check_profile(first, total)
    if steps is not None and steps[1] > total:
        raise UserError(f"monitor.profile_steps: {steps} goes beyond the run's {total} steps (schedule.total)")


def _steps(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of steps; --profile={DEFAULT}, or --profile at the end"
        )
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1 step, not {text}")
    return int(text)
