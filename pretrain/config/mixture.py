"""Named sources of a training run: how much of each, how often at most, and when that changes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Tag, create_model

from parallel.layout import Problem
from pretrain.config.duration import Interval, Span
from pretrain.config.section import Section, meaning

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # a part of paths in the config and of tags in TensorBoard
MAPPING = "<names>"  # the alternative of `data.train` that is a mapping; not shown


def _with_unit(value: Any) -> Any:
    """`2B` and `2000000` are tokens too."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        value = str(int(value))
    return f"{value} tokens" if isinstance(value, str) and not re.search(r"[a-z]{5}", value) else value


def _in_tokens(span: Span) -> Span:
    if span.unit != "tokens":
        raise ValueError(f"a budget is in tokens, found {span}")
    return span


Budget = Annotated[Interval, AfterValidator(_in_tokens), BeforeValidator(_with_unit)]


class NamedSource(Section):
    """One source of a mixture."""

    folder: str = meaning(..., "folder of its shards")
    weight: float | None = meaning(None, "its share of the sequences is this over the sum of all weights", ge=0)
    tokens: Budget | None = meaning(None, 'training tokens that the whole run takes of it, such as "2B"')
    epochs: float | None = meaning(
        None, "times that each of its sequences is read at most; then its share goes to the others; null: any", gt=0
    )
    validation: str | None = meaning(None, "folder of held-out shards of it, whose loss is told by itself; null: none")


def _folder(value: Any) -> Any:
    """A folder alone is a source without more."""
    return {"folder": value} if isinstance(value, str) else value


def _alternative(value: Any) -> str | None:
    kinds = {str: "<folder>", list: "<folders>", dict: MAPPING}
    return next((tag for kind, tag in kinds.items() if isinstance(value, kind)), None)


Named = dict[str, Annotated[NamedSource, BeforeValidator(_folder)]]
Train = Annotated[
    Annotated[str, Tag("<folder>")] | Annotated[list[str], Tag("<folders>")] | Annotated[Named, Tag(MAPPING)],
    Discriminator(
        _alternative,
        custom_error_type="train",
        custom_error_message="must be a folder, a list of folders, or {name: folder or section, ...}",
    ),
]


class _Change(Section):
    """Other weights from a place in the run on."""

    weights: dict[str, float] = meaning(..., "of every source, by name; 0 leaves one out")

    @property
    def begin(self) -> Span:
        """Of the run, before these weights."""
        span: Span = getattr(self, "from")
        return span

    def problems(self) -> Iterator[Problem]:
        if self.begin.unit == "epochs":
            yield Problem("from", f"{self.begin}: weights do not change by epochs", "give steps or tokens")
        yield from weight_problems("weights", self.weights)


# `from` is the word for it, and a keyword of Python's.
Change: type[_Change] = create_model(
    "Change",
    __base__=_Change,
    __module__=__name__,
    **{"from": (Interval, meaning(..., "steps or tokens of the run before these weights; to the next whole step"))},  # type: ignore[call-overload]
)


def weight_problems(path: str, weights: Mapping[str, float]) -> Iterator[Problem]:
    """Weights by name that are not."""
    negative = [name for name, weight in weights.items() if weight < 0]
    if negative:
        yield Problem(path, f"of {', '.join(negative)} below 0", "give 0 or more")
    elif not any(weights.values()):
        yield Problem(path, "none is above 0", "give at least one source a share")


def named_problems(named: Named, curriculum: list[_Change]) -> Iterator[Problem]:
    """What is wrong with named sources; paths begin in `data`."""
    for name in named:
        if not NAME.fullmatch(name):
            yield Problem("train", f"{name!r:.60} is no name", "use letters, digits, - and _, and at most 64 of them")
    yield from _amount_problems(named, bool(curriculum))
    for number, change in enumerate(curriculum):
        if missing := [name for name in named if name not in change.weights]:
            yield Problem(
                f"curriculum.{number}.weights", f"no {', '.join(missing)}", "name every source; 0 leaves it out"
            )
        if unknown := [name for name in change.weights if name not in named]:
            mend = f"there are: {', '.join(named)}"
            yield Problem(f"curriculum.{number}.weights", f"data.train has no {', '.join(unknown)}", mend)
    begins = [change.begin for change in curriculum]
    for number, (one, other) in enumerate(itertools.pairwise(begins), start=1):
        if one.unit == other.unit and other.count <= one.count:
            yield Problem(f"curriculum.{number}.from", f"{other} is not after {one}", "sort them, each once")


def _amount_problems(named: Named, changes: bool) -> Iterator[Problem]:
    """Weights and budgets: each source has at most one of them, and of those without a budget all have a weight or none."""
    both = [name for name, source in named.items() if source.weight is not None and source.tokens is not None]
    free = {name: source.weight for name, source in named.items() if source.tokens is None}
    weighed = {name: weight for name, weight in free.items() if weight is not None}
    if both:
        yield Problem("train", f"{', '.join(both)}: weight and tokens say the same", "keep one of them")
    elif weighed and len(weighed) < len(free):
        without = ", ".join(name for name in free if name not in weighed)
        found = f"a weight for {', '.join(weighed)}, but neither weight nor tokens for {without}"
        yield Problem("train", found, "give every source a weight or tokens, or leave all weights out")
    elif weighed:
        yield from weight_problems("train", weighed)
    if changes and len(free) < len(named):
        budgets = ", ".join(name for name in named if name not in free)
        yield Problem(
            "curriculum", f"{budgets}: tokens of the whole run leave no weights to change", "give weights instead"
        )
