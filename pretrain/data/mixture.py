"""The named sources of a run: what each is to give, and the way that the mixture takes through it.

All is decided when the run is planned (`pretrain.data.course`), so that the order of samples stays a pure function.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from pretrain.config.data import DataConfig
from pretrain.data.course import Course
from pretrain.data.order import Source
from pretrain.data.shares import PERIOD
from pretrain.errors import UserError
from pretrain.schedule import Plan
from pretrain.spikes import Ranges

VERSION = 1  # of what is decided here and in the course: part of the recipe


class Share(NamedTuple):
    """One named source. tokens: of its shards."""

    name: str
    tokens: int
    weight: float  # in proportion to the others' that have no budget
    budget: int | None  # training tokens of the whole run
    epochs: float | None  # times that a sequence is read at most


class Mixture:
    """tokens: of each named source's shards, by name in order; sizes: of each phase of sequence lengths those of each source.
    Raises UserError where the sources cannot give the run what it asks for."""

    def __init__(
        self, data: DataConfig, seed: int, tokens: Sequence[int], sizes: Sequence[Sequence[Source]], plan: Plan
    ) -> None:
        self.seed, self.lanes, self.window = seed, data.lanes, data.window
        self.data, self.sizes, self.plan = data, sizes, plan
        self.shares = _shares(data, tokens)
        self.changes = _changes(data, plan)
        self._check_budgets()
        self._courses: dict[Ranges, Course] = {(): Course(self, ())}

    @property
    def names(self) -> list[str]:
        return [share.name for share in self.shares]

    @property
    def total(self) -> int:
        """Tokens of the run."""
        return self.plan.tokens_before(self.plan.total_steps)

    @property
    def all_budgets(self) -> bool:
        """Whether every source has one."""
        return all(share.budget is not None for share in self.shares)

    def course(self, skipped: Ranges = ()) -> Course:
        """The way of a run that passed over these ranges of sample numbers."""
        if skipped not in self._courses:
            self._courses = {(): self._courses[()], skipped: Course(self, skipped)}
        return self._courses[skipped]

    def weights(self, step: int) -> Sequence[float]:
        """Of this step, by the curriculum."""
        return next((weights for begin, weights in reversed(self.changes) if begin <= step), self._first_weights)

    @property
    def _first_weights(self) -> Sequence[float]:
        return [share.weight for share in self.shares]

    @property
    def recipe(self) -> dict[str, Any]:
        """All that decides the order beside manifests, seed, lanes and lengths."""
        given = self.data.named or {}
        budgets = any(share.budget is not None for share in self.shares)
        ends = budgets or any(share.epochs is not None for share in self.shares)
        return {
            "version": VERSION,
            "sources": {share.name: [given[share.name].weight, share.budget, share.epochs] for share in self.shares},
            "temperature": self.data.temperature,
            "curriculum": [[self.plan.samples_before(step), weights] for step, weights in self.changes],
            **({"total": self.total} if budgets else {}),
            **({"batches": [[part.sample, part.size] for part in self.plan.segments]} if ends else {}),
        }

    def seen(self, step: int, skipped: Ranges = ()) -> dict[str, dict[str, float]]:
        """Of each source the training tokens before a step, and the passes over it that these are."""
        tokens = self.course(skipped).tokens(step)
        return {
            share.name: {"tokens": count, "epochs": count / share.tokens}
            for share, count in zip(self.shares, tokens, strict=True)
        }

    def told(self) -> list[str]:
        """What each source gives to the run, in lines for people."""
        seen, slots = self.seen(self.plan.total_steps), self.course().slots(0)
        lines = [
            f"  {name}: {share / PERIOD:.2%} of the sequences at first; {seen[name]['tokens']:,} tokens in all, "
            f"{seen[name]['epochs']:.2f} epochs"
            for name, share in zip(self.names, slots, strict=True)
        ]
        lines += [f"  {self.course().events[0]}"] if 0 in self.course().events else []
        late = [begin for begin, _ in self.changes if begin >= self.plan.total_steps]
        return [
            *lines,
            *(f"warning: data.curriculum: the run ends before step {begin:,}, where one begins" for begin in late),
        ]

    def _check_budgets(self) -> None:
        for share in self.shares:
            if share.budget is not None and share.epochs is not None and share.budget > share.epochs * share.tokens:
                raise UserError(
                    f"data.train.{share.name}.tokens: {share.budget:,} are more than {share.epochs:g} epochs of its "
                    f"{share.tokens:,}; lower them, raise its epochs, or prepare more of it"
                )
        budgets = {share.name: share.budget for share in self.shares if share.budget is not None}
        asked, total = sum(budgets.values()), self.total
        batch = total - self.plan.tokens_before(self.plan.total_steps - 1)  # a run ends with a whole one
        if asked > total:
            raise UserError(
                f"data.train: the budgets of {', '.join(budgets)} are {asked:,} tokens together, and the run has {total:,}; "
                "lower them, or raise schedule.total"
            )
        if self.all_budgets and asked + batch <= total:
            raise UserError(
                f"data.train: every source has a budget, {asked:,} tokens together, and the run has {total:,}; set "
                f'schedule.total="{asked} tokens", or give one source a weight in place of its budget'
            )


def tempered(size: int, temperature: float) -> float:
    """The weight of a source of this size among others without weights; its last digits, which a platform's own logarithm may
    decide, are left out."""
    return float(f"{size ** (1 / temperature):.12g}")


def _shares(data: DataConfig, tokens: Sequence[int]) -> list[Share]:
    named = data.named or {}
    return [
        Share(
            name,
            count,
            tempered(count, data.temperature) if source.weight is None else source.weight,
            None if source.tokens is None else int(source.tokens.count),
            source.epochs,
        )
        for (name, source), count in zip(named.items(), tokens, strict=True)
    ]


def _changes(data: DataConfig, plan: Plan) -> list[tuple[int, list[float]]]:
    """Steps of the curriculum in order, and the weights from there on, by name in order."""
    found = [(plan.steps(change.begin), change) for change in data.curriculum]
    for number, ((one, _), (other, change)) in enumerate(itertools.pairwise(found), start=1):
        if other <= one:
            raise UserError(
                f"data.curriculum.{number}.from: {change.begin} is step {other:,}, and the one before begins with step "
                f"{one:,}; sort them, each at a step of its own"
            )
    return [(step, [change.weights[name] for name in sorted(change.weights)]) for step, change in found]
