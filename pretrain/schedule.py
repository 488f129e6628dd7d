"""The plan of a run: which samples each step takes, and its learning rate. A pure function of the configuration.

Steps are numbered from 0. A batch-size ramp cuts the run into segments of equal batch size; with these, the samples before a
step and the step after so many tokens are arithmetic, so a resumed run asks the same questions and gets the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from pretrain.config.duration import Span
from pretrain.config.run import Config


@dataclass(frozen=True)
class Segment:
    """Steps `step ...` take `size` sequences each, from sample number `sample` on."""

    step: int
    sample: int
    size: int


class Plan:
    """Batches and learning rates of a run. samples_per_epoch: of its data, which durations in epochs need."""

    def __init__(self, config: Config, samples_per_epoch: int | None = None) -> None:
        self.samples_per_epoch = samples_per_epoch
        self.seq_length, self.batch_size = config.data.seq_length, config.batch.size
        self.schedule, self.peak = config.schedule, config.optimizer.learning_rate
        self.segments = self._segments(config)
        self.total_steps = self.steps(config.schedule.total)
        self.in_tokens = config.schedule.total.unit == "tokens"
        self.total = self._position(self.total_steps)
        self.warmup = self._length(config.schedule.warmup)
        self.decay = None if config.schedule.decay is None else self._length(config.schedule.decay)

    def _segments(self, config: Config) -> list[Segment]:
        """The ramp spreads its increments evenly over its length, in whole steps."""
        ramp = config.batch.ramp
        if ramp is None:
            return [Segment(0, 0, self.batch_size)]
        sizes = range(ramp.start, self.batch_size, ramp.increment)
        segments, step, sample = [], 0, 0
        for number, size in enumerate(sizes, start=1):
            segments.append(Segment(step, sample, size))
            at = step if ramp.length.unit == "steps" else sample * self.seq_length
            each = 1 if ramp.length.unit == "steps" else size * self.seq_length
            # Until `number` of the equal parts of the length are over, in whole numbers: exact at any length.
            steps = max(_ceil(int(ramp.length.count) * number - at * len(sizes), each * len(sizes)), 0)
            step, sample = step + steps, sample + steps * size
        return [*segments, Segment(step, sample, self.batch_size)]

    # -- steps, samples, tokens --------------------------------------------------------------------------------------

    def size(self, step: int) -> int:
        """Sequences that this step takes."""
        return self._segment(step).size

    def samples_before(self, step: int) -> int:
        """Sequences that the steps before this one took: the first sample number of this step."""
        segment = self._segment(step)
        return segment.sample + (step - segment.step) * segment.size

    def tokens_before(self, step: int) -> int:
        return self.samples_before(step) * self.seq_length

    def steps(self, span: Span) -> int:
        """Steps until the span is reached or passed."""
        if span.unit == "steps":
            return int(span.count)
        samples = math.ceil(self._samples(span))
        segment = next(s for s in reversed(self.segments) if s.sample < samples or s.step == 0)
        return segment.step + _ceil(samples - segment.sample, segment.size)

    def steps_from(self, step: int) -> Iterator[tuple[int, int]]:
        """(first sample number, sequences) of each step from here to the end."""
        for number in range(step, self.total_steps):
            yield self.samples_before(number), self.size(number)

    def due(self, every: Span | None, before: int, after: int) -> bool:
        """Whether an interval ended between having done `before` and `after` steps."""
        if every is None:
            return False
        if every.unit == "steps":
            return after // every.count > before // every.count
        each = self._samples(every)
        return self.samples_before(after) // each > self.samples_before(before) // each

    def _samples(self, span: Span) -> Fraction:
        """Of a span in tokens or epochs, exactly."""
        if span.unit == "tokens":
            return Fraction(span.count) / self.seq_length
        assert self.samples_per_epoch is not None, "a duration in epochs needs the size of the data"
        return Fraction(span.count) * self.samples_per_epoch

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


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
