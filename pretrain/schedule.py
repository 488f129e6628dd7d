"""The plan of a run: which samples each step takes, and its learning rate. A pure function of the configuration.

Steps are numbered from 0. A batch-size ramp and phases of other sequence lengths cut the run into segments whose steps are
alike; with these, the samples before a step and the step after so many tokens are arithmetic, so a resumed run asks the same
questions and gets the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from pretrain.config.duration import Span
from pretrain.config.run import Config
from pretrain.spikes import Ranges, past


@dataclass(frozen=True)
class Segment:
    """Steps `step ...` take `size` sequences of `seq_length` tokens each, from sample number `sample` on; before them were
    `tokens`."""

    step: int
    sample: int
    tokens: int
    phase: int
    seq_length: int
    size: int

    def place(self, unit: str) -> int:
        """Steps or tokens of the run before this segment."""
        return self.step if unit == "steps" else self.tokens

    def steps_to(self, place: Fraction | int, unit: str) -> int:
        """Steps of this segment until so many steps or tokens of the run are over."""
        each = 1 if unit == "steps" else self.size * self.seq_length
        return max(math.ceil((Fraction(place) - self.place(unit)) / each), 0)

    def after(self, steps: int, phase: int, seq_length: int, size: int) -> Segment:
        """The one that follows so many of its steps."""
        samples = steps * self.size
        tokens = samples * self.seq_length
        return Segment(self.step + steps, self.sample + samples, self.tokens + tokens, phase, seq_length, size)


def segments(config: Config) -> Iterator[Segment]:
    """Of a run of any length. The ramp spreads its increments evenly over its length; these and phases are whole steps."""
    ramp, lengths, phases = config.batch.ramp, [phase.length for phase in config.data.phases], config.phases
    sizes = [] if ramp is None else [*range(ramp.start, config.batch.size, ramp.increment)]
    grown = 0  # increments of the ramp that are over
    here = began = Segment(0, 0, 0, 0, phases[0].data.seq_length, sizes[0] if sizes else phases[0].batch.size)
    while True:
        yield here
        ahead = []  # of either kind the next border: steps to it, and what holds behind it
        if ramp is not None and grown < len(sizes):
            # In whole numbers: exact at any length.
            place = Fraction(int(ramp.length.count) * (grown + 1), len(sizes))
            ahead.append((here.steps_to(place, ramp.length.unit), grown + 1, here.phase))
        if here.phase < len(lengths):
            count, unit = int(lengths[here.phase].count), lengths[here.phase].unit
            ahead.append((here.steps_to(began.place(unit) + count, unit), grown, here.phase + 1))
        if not ahead:
            return
        steps, grown, phase = min(ahead)
        size = sizes[grown] if grown < len(sizes) else phases[phase].batch.size
        here = here.after(steps, phase, phases[phase].data.seq_length, size)
        if phase != began.phase:
            began = here


class Plan:
    """Batches and learning rates of a run. samples_per_epoch: of its data in sequences of data.seq_length, which durations in
    epochs need."""

    def __init__(self, config: Config, samples_per_epoch: int | None = None) -> None:
        self.tokens_per_epoch = None if samples_per_epoch is None else samples_per_epoch * config.data.seq_length
        self.schedule, self.peak = config.schedule, config.optimizer.learning_rate
        self.phases, self.segments = config.phases, list(segments(config))
        self.total_steps = self.steps(config.schedule.total)
        self.in_tokens = config.schedule.total.unit == "tokens"
        self.total = self._position(self.total_steps)
        self.warmup = self._length(config.schedule.warmup)
        self.decay = None if config.schedule.decay is None else self._length(config.schedule.decay)

    # -- steps, samples, tokens --------------------------------------------------------------------------------------

    def size(self, step: int) -> int:
        """Sequences that this step takes."""
        return self._segment(step).size

    def seq_length(self, step: int) -> int:
        """Tokens of each of its sequences."""
        return self._segment(step).seq_length

    def micro_size(self, step: int) -> int:
        """Sequences of it that a rank computes at once."""
        return self.phases[self.phase(step)].batch.micro_size

    def samples_before(self, step: int) -> int:
        """Sequences that the steps before this one took: the first sample number of this step."""
        segment = self._segment(step)
        return segment.sample + (step - segment.step) * segment.size

    def tokens_before(self, step: int) -> int:
        """Tokens of the steps before this one."""
        segment = self._segment(step)
        return segment.tokens + (step - segment.step) * segment.size * segment.seq_length

    def epochs_before(self, step: int) -> float:
        """Passes over the data."""
        return float(self.tokens_before(step) / self._tokens(Span(1, "epochs")))

    def phase(self, step: int) -> int:
        """Number of the phase that this step is of."""
        return self._segment(step).phase

    def end_of(self, phase: int) -> int:
        """Steps until the phase is over."""
        return min([self.total_steps, *(segment.step for segment in self.segments if segment.phase > phase)])

    def steps(self, span: Span) -> int:
        """Steps until the span is reached or passed."""
        if span.unit == "steps":
            return int(span.count)
        tokens = self._tokens(span)
        segment = next(s for s in reversed(self.segments) if s.tokens < tokens or s.step == 0)
        return segment.step + segment.steps_to(tokens, "tokens")

    def steps_from(self, step: int, end: int | None = None, skipped: Ranges = ()) -> Iterator[tuple[int, int]]:
        """(first sample number, sequences) of each step from here to `end`, the run's unless given; skipped: ranges of sample
        numbers that are passed over, each of which begins where a step would."""
        for number in range(step, self.total_steps if end is None else end):
            yield past(self.samples_before(number), skipped), self.size(number)

    def due(self, every: Span | None, before: int, after: int) -> bool:
        """Whether an interval ended between having done `before` and `after` steps."""
        if every is None:
            return False
        if every.unit == "steps":
            return after // every.count > before // every.count
        each = self._tokens(every)
        return self.tokens_before(after) // each > self.tokens_before(before) // each

    def _tokens(self, span: Span) -> Fraction:
        """Of a span in tokens or epochs, exactly."""
        if span.unit == "tokens":
            return Fraction(span.count)
        assert self.tokens_per_epoch is not None, "a duration in epochs needs the size of the data"
        return Fraction(span.count) * self.tokens_per_epoch

    def _segment(self, step: int) -> Segment:
        return next(s for s in reversed(self.segments) if s.step <= step)

    # -- learning rate -----------------------------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        """Of this step. Positions count its own end, in the unit of schedule.total: the first step's rate is not zero,
        the last one's is the final rate."""
        position, kind = self._position(step + 1), self.schedule.kind
        if kind == "inverse-sqrt":
            # Vaswani et al. 2017, section 5.3: hidden^-0.5 min(n^-0.5, n warmup^-1.5), whose peak is (hidden warmup)^-0.5
            return self.peak * min(position / self.warmup, math.sqrt(self.warmup / position))
        if position < self.warmup:
            return self.peak * position / self.warmup
        return self.peak * self._decayed(position)

    def _decayed(self, position: float) -> float:
        """Fraction of the peak after the warm-up."""
        kind, final = self.schedule.kind, self.schedule.final_fraction
        if kind == "constant":
            return 1.0
        if kind == "wsd":
            length = self.total / 10 if self.decay is None else self.decay
            start, end = max(self.total - length, self.warmup), self.total
        else:
            start, end = self.warmup, self.total if self.decay is None else self.decay
        done = min(max((position - start) / max(end - start, 1e-9), 0.0), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done
        return final + (1 - final) * left

    def _position(self, step: int) -> int:
        """How far the run is before this step, in the unit of schedule.total."""
        return self.tokens_before(step) if self.in_tokens else step

    def _length(self, span: Span) -> int:
        """A span in the unit of schedule.total."""
        if span.unit == ("tokens" if self.in_tokens else "steps"):
            return int(span.count)
        return self._position(self.steps(span))
