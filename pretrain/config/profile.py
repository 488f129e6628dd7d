"""The option --profile of `train` and of the launcher, and the runs that are too short for it."""

from __future__ import annotations

import argparse

from pretrain.errors import UserError

DEFAULT = 5  # steps that are measured
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


def _steps(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of steps; --profile={DEFAULT}, or --profile at the end"
        )
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1 step, not {text}")
    return int(text)
