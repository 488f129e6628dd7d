"""A run on the terminal: one live line on a screen, a plain line each logging interval in a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich import progress
from rich.console import Console

from pretrain.room import FAILS


class Terminal:
    """total: steps of the run."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.record: Callable[[str], None] = lambda _: (
            None
        )  # has every line, also those that a screen shows for a moment
        self.live: progress.Progress | None = None
        self.console = Console(highlight=False, markup=False, soft_wrap=True)

    def start(self, done: int) -> None:
        """The run stands after `done` steps; from here `step` counts."""
        self.done = done
        if not sys.stdout.isatty():
            return
        self.live = progress.Progress(
            progress.TextColumn("step {task.completed:,}/{task.total:,}", markup=False),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[numbers]}", markup=False),
            progress.TextColumn("ETA {task.fields[eta]}", markup=False),
            console=self.console,
            refresh_per_second=4,
        )
        self.task = self.live.add_task(
            "", total=self.total, completed=done, numbers="the first step is slow", eta="-:--:--"
        )
        self.live.start()

    def set_back(self, done: int) -> None:
        """The run stands after `done` steps again."""
        self.done = done
        if self.live is not None:
            self.live.update(self.task, completed=done)

    def step(self) -> None:
        self.done += 1
        if self.live is not None:
            self.live.update(self.task, completed=self.done)

    def log(self, fields: dict[str, Any]) -> None:
        numbers = [f"loss {fields['loss']:.4f}"]
        if self.live is None:
            numbers += [f"grad norm {fields['grad_norm']:.3f}", f"lr {fields['learning_rate']:.2e}"]
        eta = "-:--:--"
        for unit in ("tokens", "examples"):
            if f"{unit}_per_second" in fields:
                numbers.append(f"{fields[f'{unit}_per_second']:,.0f} {unit}/s")
        if "step_seconds" in fields:
            eta = clock((self.total - fields["step"]) * fields["step_seconds"])
        if "mfu" in fields:
            numbers.append(f"MFU {fields['mfu']:.1%}")
            if fields["hfu"] != fields["mfu"]:
                numbers.append(f"HFU {fields['hfu']:.1%}")
        if self.live is None:
            self.say(f"step {fields['step']:,}/{self.total:,}: " + ", ".join([*numbers, f"ETA {eta}"]))
        else:
            self.live.update(self.task, numbers="  ".join(numbers), eta=eta)
            self.record(f"step {fields['step']:,}/{self.total:,}: " + ", ".join([*numbers, f"ETA {eta}"]))

    def say(self, *lines: str) -> None:
        """Lines that stay, above the live one. A full disk behind them, as a job's output has it, ends no run."""
        for line in lines:
            self.record(line)
        try:
            for line in lines:
                self.console.print(line)
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in FAILS:
                raise

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None


def clock(seconds: float) -> str:
    """3725 -> 1:02:05"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def short(count: float) -> str:
    """1234567 -> 1.23M"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
