"""Training: the loop, and the run that it drives.

The loop holds only verbs; a `Run` is one training run at one place of the grid. All that its future depends on is the
config, `State` and the engine's tensors, so a checkpoint holds just these.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from parallel.engine import Step
from parallel.grid import Grid
from pretrain import checkpoint, resuming, runs
from pretrain.build import Built, build
from pretrain.checkpoint import State
from pretrain.config.duration import Span
from pretrain.config.run import Config
from pretrain.data.sources import Sources
from pretrain.data.stream import batch_hash, prefetch
from pretrain.heartbeat import Heartbeat
from pretrain.held_out import validation_of
from pretrain.initial import start_of
from pretrain.interrupt import Interrupt
from pretrain.keeping import Keeper
from pretrain.objectives.choice import Objective, objective_for
from pretrain.objectives.filler import count_filler
from pretrain.passing import AnyStream, Passing
from pretrain.policy import Policy
from pretrain.profile import Profiler
from pretrain.report import Silent
from pretrain.schedule import Plan
from pretrain.showing import Showing
from pretrain.step_data import StepData
from pretrain.stragglers import Stragglers
from pretrain.trainable import frozen_weights

WAIT = 0.9  # of the ranks' time limit, for a batch: who waits for data says what it is before the others give it up


def train(run: Run) -> str:
    """Step until the schedule ends or something else does; returns what."""
    if run.state.step == 0:
        run.validate()
    for data in run.data():
        loss = run.forward_backward(data)
        run.judge(data, loss)
        update = run.update()
        run.advance(data, update)
        run.log(data, loss, update)
        run.end_step()
        if run.went_back():
            continue
        if run.due(run.config.monitor.validate_every) or run.at_end:
            run.validate()
        run.show()
        reason = run.ending(data.stop or run.asked_alone)
        if reason or run.to_be_kept or run.due(run.config.checkpoint.every) or data.save:
            run.save()
        if reason:
            run.end_saving()
            return reason
    return "finished"


class Run:
    """A training run at one place of the grid."""

    def __init__(self, config: Config, grid: Grid, sources: Sources, interrupt: Interrupt) -> None:
        self.config, self.grid, self.sources, self.interrupt = config, grid, sources, interrupt
        self.reporter = Silent()
        self.heartbeat = Heartbeat()
        self.folder = Path(config.run.dir)
        self.profile = Profiler(grid, self.folder)
        self.plan = Plan(config, sources.train.samples_per_epoch)
        self.tokenizer = sources.tokenizer
        self.objective: Objective = objective_for(config, sources)
        self.frozen = frozen_weights(config, sources.sizes)
        self.start = start_of(config, grid, self.frozen, None if sources.task is None else sources.task.labels)
        self.built: Built = build(config, grid, sources.sizes, self.start.values)
        self.engine, self.built.schedule.phase = self.built.engine, self.profile.phase
        self.keeper = Keeper(config, grid, self.plan)
        self.validation = validation_of(config, grid, sources, self.objective)
        self.showing = Showing(config, grid, sources, self.objective, self.built)
        self.state = State()
        self.before = self.state  # the state one step ago: an interval is due when it was crossed since
        self.counted = self.state  # the state when `updates` and `bad_steps` were last read back
        self.stragglers = Stragglers(grid, config.monitor.straggler_factor)
        self.policy, self.is_back = Policy(config), False
        self.passing = Passing(sources, grid)
        self.spike: str | None = None  # of this step, in words
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=grid.device)  # in a row, up to the last step

    # -- one step --------------------------------------------------------------------------------------------------

    def data(self) -> Iterator[StepData]:
        """The steps from here to the schedule's end, wherever the run goes back to."""
        while not self.at_end:
            self.is_back = False
            yield from self._data_ahead()

    def _data_ahead(self) -> Iterator[StepData]:
        """The steps from here to the phase's end, or until the run goes back; one prefetch thread reads ahead."""
        phase = self.plan.phase(self.state.step)
        end = self.plan.end_of(phase)
        self.sources.pass_over(self.state.passed)
        stream = self.sources.stream(phase, self.state.skipped)
        source = prefetch(
            stream,
            self.plan.steps_from(self.state.step, end, self.state.skipped),
            self.grid.data_rank,
            self.grid.data_size,
            self.config.data.prefetch,
            self.objective.also,
            WAIT * self.config.parallel.timeout,
        )
        self.heartbeat.reader = source.waits_for
        try:
            while self.state.step < end and not self.is_back:
                self.heartbeat.mark(self.state.step + 1, "data")
                self.profile.begin_step(self.state.step + 1)
                with self.profile.phase("data"):
                    started = time.perf_counter()
                    numbers, tokens = next(source)
                    waited = time.perf_counter() - started
                    made = self._step_data(stream, numbers, tokens, waited)
                yield made
        finally:
            source.close()

    def _step_data(self, stream: AnyStream, numbers: np.ndarray, tokens: np.ndarray, waited: float) -> StepData:
        micro_size = self.plan.micro_size(self.state.step)
        rows = (torch.from_numpy(numbers), torch.from_numpy(tokens))
        made = [self.objective(*micro) for micro in zip(*(part.split(micro_size) for part in rows), strict=True)]
        counted = torch.stack([batch.counts() for batch in made]).sum(dim=0) * self.grid.reads_data
        own = tokens[:, : self.plan.seq_length(self.state.step)]
        filled = 0 if self.sources.task else count_filler(own, self.tokenizer.eos) * self.grid.reads_data
        passing = self.passing.counts(stream, self.state, numbers, own)
        self.heartbeat.mark(self.state.step + 1, "count of targets")
        asked, keeper = self.interrupt.asked, self.keeper
        told = self.grid.total_on_host(
            *counted.numpy().tolist(),
            *(filled, *passing),
            *(asked, keeper.failed, keeper.tries_again, self.profile.asked()),
        )
        *targets, filler, passed, unknown, stop, failed, again, profile = told
        if passed or unknown:
            self.state = self.passing.settle(self.state, int(passed), self.reporter)
        if failed:
            keeper.finish(self.reporter)
        if profile:
            self.reporter.say(self.profile.ask(self.state.step + 1, self.plan.total_steps))
        batches = [batch.to(self.grid.device) for batch in made]
        size = len(numbers) * self.grid.data_size
        return StepData(numbers, tokens, batches, size, int(filler), targets, stop > 0, again > 0, waited)

    def forward_backward(self, data: StepData) -> torch.Tensor:
        """This rank's sum of losses, one a term; gradients of the terms' means over all their targets accumulate."""
        self.heartbeat.mark(self.state.step + 1, "forward-backward")
        self.built.train(True)
        if self.built.mixout is not None:
            self.built.mixout.begin(self.state.step)
        # The engine averages over the replicas, so each gives their number times its part of the mean.
        scales = [self.grid.replica_size / max(count, 1.0) for count in data.targets]
        scale = scales[0] if len(scales) == 1 else torch.tensor(scales, device=self.grid.device)
        with self.stragglers.measuring(self.due_next(self.config.monitor.log_every)):
            return self.built.schedule.run(data.batches, scale=scale)

    def judge(self, data: StepData, loss: torch.Tensor) -> None:
        """Whether the step is a spike, which then changes nothing. Collective where a policy asks."""
        if self.policy.is_off:
            return
        total = sum(self.mean_losses(data, loss).values())
        self.state, self.spike = self.policy.judge(self.state, self.grid.from_first(total))
        if self.spike is not None:
            self.engine.leave_out()

    def update(self) -> Step:
        self.heartbeat.mark(self.state.step + 1, "optimizer step")
        with self.profile.phase("optimizer"), self.showing.gauges.watching(self.due_next):
            return self.engine.step(self.learning_rate())

    def learning_rate(self) -> float:
        return self.plan.learning_rate(self.state.step)

    def advance(self, data: StepData, update: Step) -> None:
        self.before, now = self.state, self.state
        self.state = dataclasses.replace(now, step=now.step + 1, samples=now.samples + data.size)
        self.bad_steps = (self.bad_steps + 1) * ~update.applied
        monitor = self.config.monitor
        if self.at_end or any(map(self.due, (monitor.log_every, monitor.validate_every, self.config.checkpoint.every))):
            self.count_updates()

    def count_updates(self) -> None:
        """Read back how many steps were applied, and tell of those that were not. To read is to wait for the device, so
        it is done at steps that wait in any case."""
        if self.counted.step == self.state.step:
            return
        before, self.state = (
            self.counted,
            dataclasses.replace(self.state, updates=self.engine.updates, bad_steps=int(self.bad_steps.item())),
        )
        self.counted = self.state
        steps, updates = self.state.step - before.step, self.state.updates - before.updates
        steps -= self.policy.left_out()
        if updates < steps:
            skipped = (
                "the step is skipped" if steps == 1 else f"{steps - updates} of the last {steps} steps are skipped"
            )
            told = (
                f"step {self.state.step}: no finite gradient norm, {skipped} "
                f"({self.state.bad_steps} in a row, the run stops at {self.config.run.max_bad_steps})"
            )
            self.reporter.warn(told)
            self.reporter.event("skip", self.state.step, told)

    def went_back(self) -> bool:
        """Sent back to a checkpoint, where the policy asks for it and there is one; a step that was left out is told of."""
        spike, self.spike = self.spike, None
        bad = self.state.bad_steps >= self.config.run.max_bad_steps
        if self.policy.rewinds(self.state) and (bad or spike is not None):
            self.heartbeat.mark(self.state.step, "going back")
            self.keeper.finish(self.reporter)
            found = self.policy.checkpoint(self.state, self.folder, self.reporter.warn, self.grid)
            if found is not None:
                self.go_back(found, spike or f"{self.state.bad_steps} steps in a row had no finite gradient")
                return True
        if spike is not None:
            facts = {"event": "skip", "spike": spike}
            self.reporter.left_out(self.state.step, f"{spike}; the step is skipped", facts)
        return False

    def go_back(self, found: checkpoint.Checkpoint, why: str) -> None:
        """To a checkpoint, which is written again with the range that is passed over, so that a resume knows it too."""
        at = self.state
        checkpoint.load_engine(found, self.engine, self.grid)
        self.state = self.before = self.counted = self.policy.sent_back(found.state, at)
        self.bad_steps.fill_(0)
        self.policy.left_out()
        self.is_back = True
        first, end = self.state.skipped[-1]
        words = f"{why}; back from step {at.step:,}, and past the samples {first:,} to {end - 1:,}"
        facts = {"event": "rewind", "spike": why, "from_step": at.step, "skipped_samples": [first, end]}
        self.reporter.back(self.state, words, facts)
        self.save()

    # -- what happens between steps ----------------------------------------------------------------------------------

    @property
    def at_end(self) -> bool:
        return self.state.step >= self.plan.total_steps

    def due(self, every: Span | None) -> bool:
        return self.plan.due(every, self.before.step, self.state.step)

    def due_next(self, every: Span | None) -> bool:
        """Whether an interval ends with the step that is under way."""
        return self.plan.due(every, self.state.step, self.state.step + 1)

    def log(self, data: StepData, loss: torch.Tensor, update: Step) -> None:
        self.reporter.step_done(self.state.step, data.waited, data.filler)
        self.keeper.tell(self.reporter)
        if change := self.sources.event(self.state.step, self.state.skipped):
            self.reporter.say(change)
            self.reporter.event("mixture", self.state.step, change)
        if not self.due(self.config.monitor.log_every) and not self.at_end:
            return
        self.heartbeat.mark(self.state.step, "report")
        losses, digest = self.global_facts(data, loss)
        pace, straggling = self.stragglers.compare(data.waited)
        if straggling:
            self.reporter.warn(f"step {self.state.step:,}: {straggling}")
        self.reporter.log(
            step=self.state.step,
            **({} if self.sources.task else {"tokens": self.plan.tokens_before(self.state.step)}),
            samples=self.state.samples,
            **({"passed_samples": self.state.passed_samples} if self.state.passed_samples else {}),
            **self.sources.seen(self.state.step, self.state.skipped),
            **({} if len(self.plan.phases) == 1 else {"seq_length": self.plan.seq_length(self.before.step)}),
            loss=sum(losses.values()),
            **({f"{term}_loss": mean for term, mean in losses.items()} if len(losses) > 1 else {}),
            grad_norm=update.grad_norm.item(),
            learning_rate=self.plan.learning_rate(self.before.step),
            batch_size=data.size,
            batch_hash=digest,
            **pace,
        )

    def end_step(self) -> None:
        """Of what a profile counts as the step; it tells what it found when it has found it."""
        if self.profile.end_step():
            self.heartbeat.mark(self.state.step, "profile")
            with self.reporter.pause():
                lines = self.profile.report()
            self.reporter.say(*lines)

    def global_facts(self, data: StepData, loss: torch.Tensor) -> tuple[dict[str, float], str]:
        """The step's mean of each term of the loss over all ranks, and the hash of its samples. Collective."""
        grid, means = self.grid, self.mean_losses(data, loss)
        own = self.sources.train.unpadded(data.tokens)
        digest = torch.tensor(batch_hash(data.numbers, own) if grid.reads_data else 0, device=grid.device)
        return means, f"{grid.total(digest).item() % 2**64:016x}"

    def mean_losses(self, data: StepData, loss: torch.Tensor) -> dict[str, float]:
        """The step's mean of each term of the loss over all ranks. Collective."""
        grid, terms = self.grid, self.objective.terms
        nothing = torch.zeros(len(terms), dtype=torch.float64, device=grid.device)
        total = grid.total(nothing + loss.double() if grid.reads_loss else nothing).tolist()
        means = [one / max(count, 1.0) for one, count in zip(total, data.targets, strict=True)]
        return dict(zip(terms, means, strict=True))

    def validate(self) -> None:
        if self.validation is None:
            return
        self.heartbeat.mark(self.state.step, "validate")
        self.built.train(False)
        with self.reporter.pause():
            result = self.showing.translated(self.validation.run(self.built.schedule))
        lowest = math.inf if self.state.best_loss is None else self.state.best_loss
        best = result.criterion < lowest  # never one that is not a number
        self.state = dataclasses.replace(
            self.state,
            best_loss=result.criterion if best else self.state.best_loss,
            best_step=self.state.step if best else self.state.best_step,
            validations_since_best=0 if best else self.state.validations_since_best + 1,
        )
        self.reporter.validation(self.state.step, self.plan.tokens_before(self.state.step), result)

    def show(self) -> None:
        """Texts, attention, norms and histograms that are due, to TensorBoard."""
        with self.reporter.pause():
            self.showing.show(self.state.step, self.due, self.reporter, self.heartbeat)

    @property
    def to_be_kept(self) -> bool:
        """The checkpoint of this step is one of those to keep: it must be written."""
        return self.keeper.keeps(self.state, self.state.step)

    @property
    def asked_alone(self) -> bool:
        """Asked to stop in this very step; several ranks agree on that only as the next one begins."""
        return self.grid.world == 1 and self.interrupt.asked

    def ending(self, stop: bool) -> str:
        """Why the run ends after this step; empty while it goes on."""
        state, patience = self.state, self.config.monitor.patience
        if state.bad_steps >= self.config.run.max_bad_steps:
            return "diverged"
        if patience is not None and state.validations_since_best >= patience:
            return "early-stop"
        if self.at_end:
            return "finished"
        return "stopped" if stop or self.share_reached else ""

    @property
    def share_reached(self) -> bool:
        """Whether the session is to end at this share of the schedule."""
        share = self.config.run.stop_share
        return share is not None and self.state.step >= math.ceil(share * self.plan.total_steps)

    def save(self) -> None:
        """Begin to save; what is in flight is saved first."""
        self.heartbeat.mark(self.state.step, "save")
        self.count_updates()
        if self.state.bad_steps:  # a checkpoint should be a place that one wants to go on from
            self.reporter.warn(f"step {self.state.step}: saving after {self.state.bad_steps} skipped steps")
        about = runs.about(self.grid, self.sources.fingerprint, self.built.kernels, self.start.digest)
        self.keeper.save(self.state, about, self.engine, self.reporter)

    def end_saving(self) -> None:
        self.heartbeat.mark(self.state.step, "end of save")
        self.keeper.end(self.reporter)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one. A run that is over is left as it is."""
        found = checkpoint.latest(self.folder, self.reporter.warn, self.grid)
        if found is not None:
            mixed_with = None if self.built.mixout is None else self.start.digest
            resuming.check(found, self.config, self.sources.fingerprint, mixed_with)
            if warning := resuming.other_kernels(found, self.built.kernels):
                self.reporter.warn(warning)
            checkpoint.load_engine(found, self.engine, self.grid)
            self.state = self.before = self.counted = found.state
            self.bad_steps.fill_(found.state.bad_steps)
        if self.ending(stop=False):
            return
        left, chosen = self.plan.total_steps - self.state.step, self.config.monitor.profile_steps
        self.profile.start(self.state.step, left, chosen)
        runs.claim_folder(self.config, self.grid, self.sources)
        self.reporter.begin(self.state)
        for line in self.showing.unmet():
            self.reporter.warn(line)
