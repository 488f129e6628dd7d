"""Norms and histograms of weights and their gradients while a run trains, by layer or by weight (`monitor.norms_every`,
`monitor.histograms_every`). Between their intervals nothing is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor

from parallel.engine import Engine
from parallel.grid import Grid
from parallel.statistics import Histogram, Meter, histogram, spread, squares
from pretrain.config.duration import Span
from pretrain.config.monitoring import MonitorConfig

Due = Callable[[Span | None], bool]


class Norms(NamedTuple):
    """Euclidean norms by layer or weight; gradients' before clipping."""

    gradients: dict[str, float]
    weights: dict[str, float]


class Histograms(NamedTuple):
    """By layer or weight; gradients' before clipping."""

    gradients: dict[str, Histogram]
    weights: dict[str, Histogram]


class Gauges:
    """The same on every rank. `due`, where it is asked for: whether an interval ends with the step."""

    def __init__(self, monitor: MonitorConfig, engine: Engine, grid: Grid) -> None:
        self.monitor = monitor
        self.squares, self.spread = Meter(engine, grid, squares), Meter(engine, grid, spread)

    @contextmanager
    def watching(self, due: Due) -> Iterator[None]:
        """Around the engine's step."""
        with ExitStack() as watched:
            if due(self.monitor.norms_every):
                watched.enter_context(self.squares.watching())
            if due(self.monitor.histograms_every):
                watched.enter_context(self.spread.watching())
            yield

    def norms(self) -> Norms:
        """Of the gradients of the step that was watched, and of the weights that it left. Collective."""
        gradients, weights = map(self._grouped, self.squares.read())
        return Norms(*({name: math.sqrt(v.item()) for name, v in of.items()} for of in (gradients, weights)))

    def histograms(self) -> Histograms:
        """Of the same. Collective."""
        gradients, weights = map(self._grouped, self.spread.read())
        return Histograms(*({name: histogram(v) for name, v in of.items()} for of in (gradients, weights)))

    def _grouped(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, vector in vectors.items():
            group = name if self.monitor.norms_by == "weight" else layer_of(name)
            found[group] = found[group] + vector if group in found else vector
        return found


def layer_of(name: str) -> str:
    """blocks.3.attention.q.weight -> blocks.3, embedding.weight -> embedding."""
    block = re.match(r"(?:.+\.)?blocks\.\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0]
