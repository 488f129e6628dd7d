"""Tensors of theirs and of ours, and which of them each class of theirs has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """A tensor of theirs, and those of ours that it holds one after the other.

    In names {layer} stands for each layer's number and {kind} for weight and bias. A row whose tensors the model lacks
    (biases of a model without) does not apply. form: "plain"; "turned", stored as (in, out); "by head", the rows of ours
    (each (N D, ...)) one head after the other, (N, 3, D, ...).
    """

    theirs: str
    ours: tuple[str, ...]
    form: Literal["plain", "turned", "by head"] = "plain"

    def expanded(self, num_layers: int) -> Iterator[Row]:
        """The row of each layer and kind."""
        layers = range(num_layers) if "{layer}" in self.theirs else (0,)
        kinds = ("weight", "bias") if "{kind}" in self.theirs else ("",)
        for layer in layers:
            for kind in kinds:
                names = {"layer": layer, "kind": kind}
                yield Row(self.theirs.format(**names), tuple(name.format(**names) for name in self.ours), self.form)


@dataclass(frozen=True)
class ModelClass:
    """A class of theirs: an architecture's body and these heads.

    objectives: kinds of ours that the heads are for. optional: rows of heads that a folder of this class may have as well.
    ignored: patterns of tensors that it may have, and that the class does not read.
    """

    name: str
    objectives: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    optional: tuple[Row, ...] = ()
    ignored: tuple[str, ...] = ()

    def fits(self, names: Collection[str], heads: Collection[str]) -> bool:
        """Whether a model of the tensors `names` has just its heads; `heads`: every head's tensors. The output layer may be
        tied to the embedding."""
        needed, held = names_of(self.rows), names_of((*self.rows, *self.optional))
        return needed - {"head.weight"} <= set(names) and set(names) & set(heads) <= held


def names_of(rows: Iterable[Row]) -> set[str]:
    """Our tensors that are in rows of heads."""
    return {name for row in rows for each in row.expanded(0) for name in each.ours}
