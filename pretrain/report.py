"""What a run says of itself, by rank 0: the terminal, metrics.jsonl, TensorBoard, summary.json, of a task result.json.

Rates are of the wall clock between steps, all included (data, forward, backward, update, this report) but validation,
samples and saving; the first step after a start, and of each phase, compiles and warms up, and is left out. Filler is no token.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from parallel.grid import Grid
from pretrain.board import Board
from pretrain.checkpoint import State
from pretrain.config.folder import SUMMARY
from pretrain.config.run import Config
from pretrain.flops import needed_flops, peak_flops
from pretrain.gauges import Histograms, Norms
from pretrain.metrics import Metrics, finite
from pretrain.rates import Rates
from pretrain.results import RESULT, of_run, validations, write_result
from pretrain.room import Lasting
from pretrain.saving import Saved, Unsaved
from pretrain.schedule import Plan
from pretrain.terminal import Terminal, short
from pretrain.validation import Result


class Facts(NamedTuple):
    """What is known of a run when it begins."""

    parameters: int
    frozen: int  # of these, that do not learn
    vocab_size: int
    plan: Plan
    compiled: str
    kernels: str
    passed_over: list[str]
    start: str = ""  # where the weights are from, unless they are random
    findings: tuple[str, ...] = ()  # what was mended or left out of the data


class Silent:
    """Says nothing: every rank but the first, and tests."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def begin(self, state: State) -> None:
        """The run stands at `state` and goes on from there."""

    def say(self, *lines: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def left_out(self, step: int, words: str, facts: dict[str, Any]) -> None:
        """A policy has left something out, a step or data that cannot be had; facts: for metrics."""

    def back(self, state: State, words: str, facts: dict[str, Any]) -> None:
        """It has sent the run back to `state`: what was reported beyond is taken back."""

    def step_done(self, step: int, waited: float, filler: int = 0) -> None:
        """The step-th step ended, of which `waited` seconds were for data; filler: tokens that only fill rows."""

    def log(self, **fields: Any) -> None:
        """The numbers of a step that is due."""

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is no training, and counts for no rate."""
        yield

    def validation(self, step: int, tokens: int, result: Result) -> None: ...

    def text(self, step: int, text: str) -> None:
        """A text by the model."""

    def attention(self, step: int, images: dict[int, Any], tokens: Sequence[str]) -> None:
        """As `pretrain.board.Board.attention`."""

    def norms(self, step: int, norms: Norms) -> None:
        """Of weights and gradients."""

    def histograms(self, step: int, histograms: Histograms) -> None:
        """Of weights and gradients."""

    def event(self, kind: str, step: int, words: str) -> None:
        """What TensorBoard's timeline marks, one of `pretrain.charts.EVENTS` or MIXTURE."""

    def flush(self) -> None:
        """Bring to the disk what was reported so far."""

    def saved(self, saved: Saved) -> None:
        """A checkpoint is on the disk."""

    def unsaved(self, lost: Unsaved, last: str) -> None:
        """A checkpoint could not be written; last: which one is the newest, in words."""

    def over(self, state: State, reason: str) -> None:
        """In place of `begin` and `end`, for a run that had ended before."""

    def end(self, state: State, reason: str) -> None:
        """The run ends: "finished", "stopped" (it was asked to), "early-stop" or "diverged"."""


class Reporter(Silent):
    """Rank 0's report. Used as a context, so that the terminal is whole again however the run ends."""

    def __init__(self, config: Config, grid: Grid, facts: Facts) -> None:
        self.config, self.grid, self.facts = config, grid, facts
        self.folder = Path(config.run.dir)
        self.plan = facts.plan
        self.terminal = Terminal(facts.plan.total_steps)
        self.metrics: Metrics | None = None
        self.board: Lasting | None = None
        self.unit = "examples" if config.objective.is_task else "tokens"
        self.rates = Rates(self.unit)
        self.criterion = "validation error" if config.objective.has_head else "validation loss"
        self.session, self.trained, self.trained_seconds = time.perf_counter(), 0, 0.0
        self.latest: dict[str, float] = {}
        self.saves: dict[str, float] = {}  # times of the last save, until they are logged
        self.failures = 0  # checkpoints of this session that could not be written
        peak = peak_flops(grid.device, config.precision.compute, config.monitor.peak_tflops)
        self.flops = [needed_flops(phase, facts.vocab_size) for phase in self.plan.phases]
        # The formula has every weight's gradient: no share of the peak is told where some have none.
        self.peak = peak * grid.world if peak and not facts.frozen else None

    def __exit__(self, *_: object) -> None:
        self.terminal.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.board is not None:
            self.board.close(ended=False)

    def begin(self, state: State) -> None:
        for name in (SUMMARY, RESULT):
            (self.folder / name).unlink(missing_ok=True)
        self._open(state)
        if state.step:
            self.event("resume", state.step, self._resumed(state))
        self.terminal.say(*self._introduction(state))
        self.terminal.start(state.step)
        self.rates.clear()

    def _open(self, state: State) -> None:
        """What is written step by step, cut back to where the run stands."""
        self.metrics = Metrics(self.folder, state.step, self.warn, state.rewinds)
        if self.config.monitor.tensorboard:
            make = functools.partial(Board, self.config, parameters=self.facts.parameters)
            self.board = Lasting(make, state.step, self.warn, "TensorBoard")

    def left_out(self, step: int, words: str, facts: dict[str, Any]) -> None:
        assert self.metrics is not None
        self.warn(f"step {step:,}: {words}")
        self.metrics.write({"step": step, **facts})
        kinds = {"rewind": "rewind", "pass": "skip"}
        self.event(kinds.get(facts["event"], "spike"), step, f"step {step:,}: {words}")

    def back(self, state: State, words: str, facts: dict[str, Any]) -> None:
        assert self.metrics is not None
        self.metrics.close()
        if self.board is not None:
            self.board.close(ended=False)
        self._open(state)
        self.terminal.set_back(state.step)
        self.rates.warm = False
        self.rates.clear()
        self.left_out(state.step, words, {**facts, "rewinds": state.rewinds})

    def _introduction(self, state: State) -> Iterator[str]:
        config, facts, device = self.config, self.facts, self.grid.device
        where = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        steps = self.plan.total_steps
        yield (
            f"{self.folder}: {config.model.kind} of {short(facts.parameters)} parameters{self._learning()}, "
            f"{config.precision.compute}, "
            f"{facts.compiled}, on {where}, layout {self.grid.layout}"
        )
        folders = ", ".join(config.data.train_folders)
        size, epochs = short(self._seen(steps)), self.plan.epochs_before(steps)
        yield f"{steps:,} steps, {size} {self.unit} ({epochs:.2f} epochs of {folders})"
        if facts.start:
            yield facts.start
        yield from facts.findings
        yield f"kernels: {facts.kernels}"
        for reason in facts.passed_over:
            yield f"  not {reason}"
        if state.step:
            yield self._resumed(state)
        if len(self.plan.phases) > 1:
            yield self._phase(self.plan.phase(state.step))
            if self.plan.phase(steps - 1) < len(self.plan.phases) - 1:
                yield f"warning: schedule.total ends before a step is of data.seq_length {config.data.seq_length}"

    def _resumed(self, state: State) -> str:
        return f"going on after step {state.step:,}"

    def _phase(self, number: int) -> str:
        of, phases = self.plan.phases[number], len(self.plan.phases)
        length, end = of.data.seq_length, self.plan.end_of(number)
        return f"phase {number + 1} of {phases}: sequences of {length:,} tokens up to step {end:,}"

    def _seen(self, step: int) -> int:
        """Tokens, or of a task examples, of the steps up to this one."""
        return self.plan.tokens_before(step) if self.unit == "tokens" else self.plan.samples_before(step)

    def _learning(self) -> str:
        parameters, frozen = self.facts.parameters, self.facts.frozen
        share = (parameters - frozen) / parameters
        return f", {short(parameters - frozen)} of which learn ({share:.2%})" if frozen else ""

    def say(self, *lines: str) -> None:
        self.terminal.say(*lines)

    def warn(self, text: str) -> None:
        self.terminal.say(f"warning: {text}")

    def step_done(self, step: int, waited: float, filler: int = 0) -> None:
        phase = self.plan.phase(step - 1)
        self.rates.add(self._seen(step) - self._seen(step - 1) - filler, waited, self.flops[phase])
        self.terminal.step()
        if step < self.plan.total_steps and self.plan.phase(step) > phase:
            self.terminal.say(f"step {step:,}: {self._phase(self.plan.phase(step))}")
            self.rates.warm = False

    def log(self, **fields: Any) -> None:
        assert self.metrics is not None
        rates = self.rates.fields()
        fields |= {**rates, **self.saves, "memory_bytes": self._memory()}
        fields |= {"failed_saves": self.failures} if self.failures else {}
        self.saves = {}
        if rates and self.peak and self.unit == "tokens":
            fields |= {name: sum / self.rates.seconds / self.peak for name, sum in self.rates.flops.items()}
        self.trained += self.rates.tokens
        self.trained_seconds += self.rates.seconds
        self.metrics.write(fields)
        if self.board is not None:
            step = fields["step"]
            more = {"epochs": self.plan.epochs_before(step), "memory_gibibytes": fields["memory_bytes"] / 2**30}
            self.board.scalars(step, {**fields, **more})
            self.board.timeline(step)
        self.latest = fields
        self.terminal.log(fields)
        self.rates.clear()

    def _memory(self) -> int:
        """Bytes that rank 0 holds at most: of the GPU's memory, or of the process."""
        if self.grid.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.grid.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.rates.started += time.perf_counter() - before

    def validation(self, step: int, tokens: int, result: Result) -> None:
        assert self.metrics is not None
        seen = {"tokens": tokens} if self.unit == "tokens" else {}
        fields: dict[str, Any] = {"step": step, **seen, **result.measures, **result.by_source}
        fields |= {f"validation_{name}": score for name, score in result.scores.items()}
        fields |= {f"floor_validation_{name}": score for name, score in (result.floor or {}).items()}
        self.metrics.write({**fields, "validation_targets": result.targets})
        if self.board is not None:
            self.board.scalars(step, fields)
        self.latest = {**self.latest, "validation_loss": result.loss}
        self.terminal.say(f"step {step:,}: {result.words}")

    def text(self, step: int, text: str) -> None:
        if self.board is not None:
            self.board.text(step, text)
        self.terminal.say(f"step {step:,}, a text by the model:", *(f"  | {line}" for line in text.splitlines()[:12]))

    def attention(self, step: int, images: dict[int, Any], tokens: Sequence[str]) -> None:
        if self.board is not None:
            self.board.attention(step, images, tokens)

    def norms(self, step: int, norms: Norms) -> None:
        if self.board is not None:
            self.board.norms(step, *norms)

    def histograms(self, step: int, histograms: Histograms) -> None:
        if self.board is not None:
            self.board.histograms(step, *histograms)

    def event(self, kind: str, step: int, words: str) -> None:
        if self.board is not None:
            self.board.event(kind, step, words)

    def flush(self) -> None:
        if self.metrics is not None:
            self.metrics.flush()
        if self.board is not None:
            self.board.flush()

    def over(self, state: State, reason: str) -> None:
        self.terminal.say(*self._farewell(state, reason, None, None, None))
        if reason == "finished":
            self.terminal.say(
                "nothing is left to do; a longer schedule.total goes on from here, for example",
                f'  python -m pretrain train {self.folder} "schedule.total={2 * state.step} steps"',
            )

    def saved(self, saved: Saved) -> None:
        times = f"stood still {saved.stall_seconds:.2f} s, written in {saved.write_seconds:.1f} s"
        told = f"step {saved.step:,}: saved ({saved.bytes / 1e6:,.0f} MB, {times})"
        self.terminal.say(told)
        self.event("checkpoint", saved.step, told)
        if saved.unremoved:
            self.warn(f"an old checkpoint cannot be removed: {saved.unremoved}")
        self.saves = {
            "checkpoint_stall_seconds": saved.stall_seconds,
            "checkpoint_write_seconds": saved.write_seconds,
        }

    def unsaved(self, lost: Unsaved, last: str) -> None:
        self.failures += 1
        self.warn(
            f"step {lost.step:,}: the checkpoint could not be written: {lost.error}. The training goes on ({last}); saving "
            "is tried again when there is room, and whenever a checkpoint is due"
        )

    def end(self, state: State, reason: str) -> None:
        speed = self.trained / self.trained_seconds if self.trained_seconds else None
        first = next((line["validation_loss"] for line in validations(self.folder)), None)
        last = self.latest.get("validation_loss")
        summary = {
            "reason": reason,
            "step": state.step,
            "samples": state.samples,
            **({"tokens": self._seen(state.step)} if self.unit == "tokens" else {}),
            "parameters": self.facts.parameters,
            **({"trainable_parameters": self.facts.parameters - self.facts.frozen} if self.facts.frozen else {}),
            "loss": self.latest.get("loss"),
            "validation_loss": last,
            f"best_{self.criterion.replace(' ', '_')}": state.best_loss,
            "best_step": state.best_step,
            **({"rewinds": state.rewinds, "skipped_samples": state.skipped} if state.rewinds else {}),
            f"{self.unit}_per_second": speed,
            "session_seconds": time.perf_counter() - self.session,
            **self.saves,
        }
        partial = self.folder / f".{SUMMARY}.partial"
        partial.write_text(json.dumps(finite(summary), indent=1, allow_nan=False) + "\n")
        os.replace(partial, self.folder / SUMMARY)
        self._write_result()
        if self.board is not None:
            self.board.close(ended=True)
            self.board = None
        self.terminal.close()
        self.terminal.say(*self._farewell(state, reason, first, last, speed))

    def _write_result(self) -> None:
        """Of a task that was validated."""
        config, objective = self.config, self.config.objective
        seeds = {"run.seed": config.run.seed, "data.seed": config.data_seed}
        scored = objective.is_task or objective.kind == "sequence-to-sequence"
        result = of_run(self.folder, objective.kind, seeds) if scored else None
        if result is not None:
            write_result(self.folder, result)

    def _farewell(
        self, state: State, reason: str, first: float | None, last: float | None, speed: float | None
    ) -> Iterator[str]:
        told = f", {speed:,.0f} {self.unit}/s" if speed else ""
        if reason == "finished":
            yield f"finished: {state.step:,} steps, {short(self._seen(state.step))} {self.unit}{told}"
        if reason == "early-stop":
            best = f"the best {self.criterion} was {state.best_loss:.4f} at step {state.best_step}"
            yield f"stopped early at step {state.step:,}: {best}"
        if reason == "diverged":
            yield (
                f"stopped at step {state.step:,}: {state.bad_steps} steps in a row had no finite gradient. Lower "
                f"optimizer.learning_rate or lengthen schedule.warmup, and start again in another run.dir"
            )
        if first is not None and last is not None:
            yield f"validation loss {first:.3f} at the start, {last:.3f} now"
        if reason == "stopped":
            yield f"stopped after step {state.step:,}, which is saved{told}. Go on with"
            yield f"  python -m pretrain train {self.folder}"
