"""How a mixture goes through a run: which shares hold from which step on, and how much of each source was read by when.

A course walks the run once. From step 0, from each change of `data.curriculum` or of the sequence length, and from each step at
which a source has given what it may, shares are fixed (a stretch, `pretrain.data.shares`) until the next such step. When a source
ends is found by halving, since what was read before a step is arithmetic. So the order stays a pure function of the sample
number, with a handful of small tables however long the run is.

  budgets   A source that is to give b of the R tokens that are left gets the next whole number of 4096 slots above b / R of them:
            it has given them all shortly before the end, and ends with the batch in which it has. Shares are set anew half of the
            way to the end, and half of what is left, and so on. The others share the rest. Where all have budgets, the last one
            takes what is left. Each has given its budget to within one batch.
  caps      A source ends with the last batch before one of its sequences would be read more than `epochs` times. Lanes come to
            that within a visit or two of each other, so about two sequences a lane may be left unread.
  skipped   Ranges of sample numbers that the run passed over (`pretrain.spikes`) move all that comes after them: a change comes
            at its step, whichever sample number that has. What was passed over counts as read, but not as tokens seen.

Legend: L lanes, K sources.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pretrain.data.order import Order, Source
from pretrain.data.shares import PERIOD, Integers, Stretch, slots_of
from pretrain.errors import UserError
from pretrain.spikes import Ranges, past

if TYPE_CHECKING:
    from pretrain.data.mixture import Mixture

Slots = tuple[int, ...]


class Course:
    """orders: of each phase of sequence lengths; events: by step, what changes there, in words. Raises UserError where the run is
    longer than what the sources may give."""

    def __init__(self, mixture: Mixture, skipped: Ranges) -> None:
        self.mixture, self.plan, self.skipped = mixture, mixture.plan, skipped
        self.orders: list[Order] = []
        self.events: dict[int, str] = {}
        self._stretches: list[list[Stretch]] = []  # of each phase
        self._seen = [np.zeros(len(mixture.shares), np.int64)]  # tokens of each source before each phase
        self._open = set(range(len(mixture.shares)))
        self._reasons: list[str] = []  # for the next stretch, in words
        for phase in range(len(mixture.sizes)):
            self._walk(phase)

    def slots(self, step: int) -> Slots:
        """Of PERIOD, each source's in this step."""
        number = self._number(step)
        stretches = reversed(self._stretches[self.plan.phase(step)])
        return next(stretch.slots for stretch in stretches if stretch.first <= number)

    def tokens(self, step: int) -> list[int]:
        """Training tokens of each source before this step."""
        phase = self.plan.phase(max(step - 1, 0))
        found: list[int] = (self._seen[phase] + self._in_phase(phase, self.orders[phase], step)).tolist()
        return found

    def _number(self, step: int) -> int:
        """A step's first sample number."""
        return past(self.plan.samples_before(step), self.skipped)

    def _begin(self, phase: int) -> int:
        """A phase's first step."""
        return 0 if phase == 0 else self.plan.end_of(phase - 1)

    def _in_phase(self, phase: int, order: Order, step: int) -> Integers:
        """Training tokens of each source from a phase's beginning to a step of it, (K,)."""
        begin, end = self._number(self._begin(phase)), self._number(step)
        passed = [(one, other) for one, other in self.skipped if begin <= one < end]
        read, *left_out = (
            order.visits(other).sum(axis=0) - order.visits(one).sum(axis=0) for one, other in [(begin, end), *passed]
        )
        found: Integers = (read - sum(left_out)) * self.plan.phases[phase].data.seq_length
        return found

    # -- the walk ----------------------------------------------------------------------------------------------------

    def _walk(self, phase: int) -> None:
        """Fix the shares of one phase of sequence lengths, stretch by stretch."""
        step, end = self._begin(phase), self.plan.end_of(phase)
        stretches: list[Stretch] = []
        base, seen = self._base(phase), self._seen[phase]
        self._arrive(step)
        while True:
            slots = self._slots(step, seen)
            stretches.append(Stretch(self._number(step), slots or self._any(stretches), base))
            order = self._order(phase, stretches)
            border = min([end, self._half(step), *(begin for begin, _ in self.mixture.changes if begin > step)])
            stop, ended = self._first_end(phase, order, step, border) if slots else (border, set())
            if ended and stop == step:  # they cannot give one batch: the same step again without them
                self._close(ended)
                stretches.pop()
                continue
            self._tell(step, stretches[-1].slots)
            self._close(ended)
            step, base = stop, order.visits(self._number(stop))
            seen = self._seen[phase] + self._in_phase(phase, order, stop)
            if step >= end:
                break
            self._arrive(step)
        self.orders.append(order)
        self._stretches.append(stretches)
        self._seen.append(seen)

    def _half(self, step: int) -> int:
        """Half of the way to the end, where the shares of budgets are set anew, so that they are met in a short run too; the end
        where there are none."""
        end = self.plan.total_steps
        budgets = any(self.mixture.shares[index].budget is not None for index in self._open)
        return step + max((end - step) // 2, 1) if budgets else end

    def _is_change(self, step: int) -> bool:
        """Whether the curriculum has other weights from here on."""
        return any(begin == step for begin, _ in self.mixture.changes)

    def _order(self, phase: int, stretches: list[Stretch]) -> Order:
        mixture = self.mixture
        return Order(
            mixture.sizes[phase], mixture.seed, lanes=mixture.lanes, window=mixture.window, stretches=stretches
        )

    def _base(self, phase: int) -> Integers:
        """(L, K): each lane's visits before a phase, in its sequences: as many tokens, begun ones over."""
        if phase == 0:
            return np.zeros((self.mixture.lanes, len(self.mixture.shares)), np.int64)
        before, after = (self.plan.phases[number].data.seq_length for number in (phase - 1, phase))
        visits: Integers = self.orders[phase - 1].visits(self._number(self._begin(phase)))
        return -(-visits * before // after)

    # -- shares ------------------------------------------------------------------------------------------------------

    def _slots(self, step: int, seen: Integers) -> Slots | None:
        """Shares from a step on, where sources had given so many tokens; None where no source may give any. Raises UserError for
        that in a run that is planned; a run that passed over samples goes on with the sources that it has."""
        shares, weights = self.mixture.shares, self.mixture.weights(step)
        needs = {i: shares[i].budget - int(seen[i]) for i in sorted(self._open) if shares[i].budget is not None}  # type: ignore[operator]
        free = {i: weights[i] for i in sorted(self._open) if shares[i].budget is None and weights[i] > 0}
        if step >= self.plan.total_steps:
            return None
        if needs or free:
            return self._shared(step, needs, free)
        if not self.skipped:
            raise UserError(self._dry(step, seen))
        self._reasons.append("samples were passed over, and no source may give more: the last ones go on")
        return None

    def _shared(self, step: int, needs: Mapping[int, int], free: Mapping[int, float]) -> Slots:
        """Of a period the next whole slot above what each budget needs of the tokens that are left; what remains by weight, or to
        the largest need."""
        found = dict.fromkeys(range(len(self.mixture.shares)), 0)
        left = max(self.mixture.total - self.plan.tokens_before(step), 1)
        found |= {index: max(math.ceil(PERIOD * need / left), 1) for index, need in needs.items()}
        room = PERIOD - len(free)
        if sum(found.values()) > room:  # in the last batches, where they may be behind
            found |= dict(zip(needs, slots_of(list(needs.values()), room), strict=True))
        rest = PERIOD - sum(found.values())
        if not free:
            found[max(needs, key=lambda index: needs[index])] += rest
            return tuple(found.values())
        found |= dict(zip(free, slots_of(list(free.values()), rest), strict=True))
        small = [self.mixture.shares[index].name for index in free if not found[index]]
        if small and (step == 0 or self._is_change(step)):
            raise UserError(
                f"data.train: from step {step:,} on {', '.join(small)} would give less than 1/{PERIOD} of the sequences; raise "
                "the weight, or leave it out"
            )
        return tuple(found.values())

    def _any(self, stretches: list[Stretch]) -> Slots:
        """The last shares that there were: of what is not part of the run, or has no other."""
        return (stretches or self._stretches[-1])[-1].slots

    # -- ends --------------------------------------------------------------------------------------------------------

    def _first_end(self, phase: int, order: Order, step: int, border: int) -> tuple[int, set[int]]:
        """The first step before `border` with which sources end, and which; the border and none where none does."""
        ends = {index: self._end_of(phase, order, index, step, border) for index in sorted(self._open)}
        stop = min(ends.values(), default=border)
        ended = {index for index, end in ends.items() if end == stop < border}
        if self.mixture.all_budgets and ended == self._open:  # the last one takes what is left
            ended.discard(max(ended, key=lambda index: self.mixture.shares[index].budget or 0))
        return (stop, ended) if ended else (border, set())

    def _end_of(self, phase: int, order: Order, index: int, step: int, border: int) -> int:
        """The step from `step` on with which a source ends; the border where it goes on."""
        share, end = self.mixture.shares[index], border
        steps = range(step, border + 1)
        if share.budget is not None and not (self.mixture.all_budgets and len(self._open) == 1):
            missing = share.budget - self._seen[phase][index]
            reached = bisect.bisect_left(steps, missing, key=lambda at: self._in_phase(phase, order, at)[index])
            end = min(step + reached, border)
        if share.epochs is not None:
            within = bisect.bisect_right(steps, share.epochs, key=lambda at: self._reads(order, index, at))
            end = min(max(step + within - 1, step), end)
        return end

    def _reads(self, order: Order, index: int, step: int) -> float:
        return most_reads(order.visits(self._number(step))[:, index], order.sources[index])

    def _close(self, ended: set[int]) -> None:
        self._open -= ended
        for share in (self.mixture.shares[index] for index in sorted(ended)):
            limits = [f"{share.budget:,} tokens"] if share.budget is not None else []
            limits += [f"epochs: {share.epochs:g}"] if share.epochs is not None else []
            self._reasons.append(f"{share.name} has given what it may ({', '.join(limits)})")

    # -- words -------------------------------------------------------------------------------------------------------

    def _arrive(self, step: int) -> None:
        if self._is_change(step):
            self._reasons.append("data.curriculum")

    def _tell(self, step: int, slots: Slots) -> None:
        """Why shares change at a step, and to what."""
        if self._reasons and step < self.plan.total_steps:
            shares = ", ".join(
                f"{name} {part / PERIOD:.2%}" for name, part in zip(self.mixture.names, slots, strict=True)
            )
            self.events[step] = f"step {step:,}: {'; '.join(self._reasons)}: from here {shares}"
        self._reasons = []

    def _dry(self, step: int, seen: Integers) -> str:
        given = ", ".join(
            f"{share.name} {count:,} ({share.epochs:g} epochs)"
            if share.epochs is not None
            else f"{share.name} {count:,}"
            for share, count in zip(self.mixture.shares, seen.tolist(), strict=True)
        )
        return (
            f"data.train: the run takes {self.mixture.total:,} tokens, and from step {step:,} on no source may give more: "
            f"they have given {given}; raise epochs, give a source without them a weight, prepare more, or set "
            f'schedule.total="{step} steps"'
        )


def most_reads(visits: Integers, source: Source) -> float:
    """How often the sequence of a source that was read most was read, in passes over its lane; visits: of each lane, (L,)."""
    lanes = np.arange(len(visits))
    if source.samples < len(lanes):  # lanes l, l + N, ... share a sequence
        return float(np.bincount(lanes % source.samples, weights=visits).max())
    return float((visits / ((source.samples - lanes + len(lanes) - 1) // len(lanes))).max())
