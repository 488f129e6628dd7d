"""Tensors of theirs and of ours, and which of them each class of theirs has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Row:
    """A tensor of theirs, and those of ours that it holds one after the other.

    In names {layer} stands for each layer's number, {decoder_layer} for that of each layer of a decoder behind an encoder,
    and {kind} for weight and bias. A row whose tensors the model lacks (biases of a model without) does not apply. form:
    "plain"; "turned", stored as (in, out); "by head", the rows of ours (each (N D, ...)) one head after the other,
    (N, 3, D, ...). even_first: dimensions, of those that each tensor of ours has, of which they store the even places
    before the odd ones.
    """

    theirs: str
    ours: tuple[str, ...]
    form: Literal["plain", "turned", "by head"] = "plain"
    even_first: tuple[int, ...] = ()

    def expanded(self, layers: Mapping[str, int]) -> Iterator[Row]:
        """The row of each layer and kind. layers: how many, by the name that stands for their numbers."""
        counted = next((name for name in layers if f"{{{name}}}" in self.theirs), "none")
        kinds = ("weight", "bias") if "{kind}" in self.theirs else ("",)
        for number in range(layers.get(counted, 1)):
            for kind in kinds:
                names = {counted: number, "kind": kind}
                ours = tuple(name.format(**names) for name in self.ours)
                yield replace(self, theirs=self.theirs.format(**names), ours=ours)


@dataclass(frozen=True)
class Fixed:
    """A tensor of theirs that has the same values in every model that ours can be, which has no such tensor. It is written,
    and a folder may lack it, but not have it with other values.

    values: "no bias", zeros (1, V); "waves", the table of sinusoidal positions (S, H), all sines before the cosines.
    """

    theirs: str
    values: Literal["no bias", "waves"]


@dataclass(frozen=True)
class ModelClass:
    """A class of theirs: an architecture's body and these heads.

    objectives: kinds of ours that the heads are for. optional: rows of heads that a folder of this class may have as well.
    ignored: patterns of tensors that it may have, and that the class does not read. fixed: tensors without ours.
    """

    name: str
    objectives: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    optional: tuple[Row, ...] = ()
    ignored: tuple[str, ...] = ()
    fixed: tuple[Fixed, ...] = ()

    def fits(self, names: Collection[str], heads: Collection[str]) -> bool:
        """Whether a model of the tensors `names` has just its heads; `heads`: every head's tensors. The output layer may be
        tied to the embedding."""
        needed, held = names_of(self.rows), names_of((*self.rows, *self.optional))
        return needed - {"head.weight"} <= set(names) and set(names) & set(heads) <= held


def names_of(rows: Iterable[Row]) -> set[str]:
    """Our tensors that are in rows of heads."""
    return {name for row in rows for each in row.expanded({}) for name in each.ours}
