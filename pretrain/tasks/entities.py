"""Entities of BIO tags, and their precision, recall and F1: micro and by type, from counts that add up.

Two readings. Default (conlleval, and seqeval without a mode): an I- that continues nothing begins an entity. Strict
(seqeval's mode="strict" with IOB2): only B- begins one, a stray I- is no entity. Say which one a figure is of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Entity = tuple[str, int, int]  # type, first token, token after the last


@dataclass(frozen=True)
class Scores:
    """Precision, recall, F1 (0 where nothing was predicted or gold) and the number of gold entities."""

    precision: float
    recall: float
    f1: float
    gold: int


@dataclass(frozen=True)
class EntityCounts:
    """Right, predicted and gold entities by type. Sum states with +; EntityCounts() is the state before any."""

    right: Counter[str] = field(default_factory=Counter)
    predicted: Counter[str] = field(default_factory=Counter)
    gold: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(
        cls, gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]], strict: bool = False
    ) -> EntityCounts:
        """Counts of sentences' tags. Raises ValueError for a sentence with other than a tag for each token."""
        counts = cls()
        for truth, guess in zip(gold, predicted, strict=True):
            if len(truth) != len(guess):
                raise ValueError(f"{len(guess)} predicted tags for {len(truth)} tokens")
            expected, found = set(entities(truth, strict)), set(entities(guess, strict))
            counts.gold.update(kind for kind, _, _ in expected)
            counts.predicted.update(kind for kind, _, _ in found)
            counts.right.update(kind for kind, _, _ in expected & found)
        return counts

    def __add__(self, other: EntityCounts) -> EntityCounts:
        return EntityCounts(self.right + other.right, self.predicted + other.predicted, self.gold + other.gold)

    @property
    def micro(self) -> Scores:
        """Over all entities."""
        return _scores(self.right.total(), self.predicted.total(), self.gold.total())

    def by_type(self) -> dict[str, Scores]:
        """Of each type that was gold or predicted, in sorted order."""
        types = sorted({*self.gold, *self.predicted})
        return {kind: _scores(self.right[kind], self.predicted[kind], self.gold[kind]) for kind in types}


def entities(tags: Sequence[str], strict: bool = False) -> list[Entity]:
    """Entities of a sentence's tags (O, B-type, I-type), in order."""
    found: list[Entity] = []
    start, kind = 0, ""  # of the open entity; "" is none
    for place, tag in enumerate([*tags, "O"]):
        if tag == f"I-{kind}" and kind:
            continue
        if kind:
            found.append((kind, start, place))
        begins = tag.startswith("B-") or (tag.startswith("I-") and not strict)
        start, kind = place, tag[2:] if begins else ""
    return found


def _scores(right: int, predicted: int, gold: int) -> Scores:
    precision, recall = right / predicted if predicted else 0.0, right / gold if gold else 0.0
    return Scores(precision, recall, 2 * right / (predicted + gold) if right else 0.0, gold)
