"""How two training runs differ: step by step, tensor by tensor, and whether that is more than rounding.

Loss and gradient norm are compared relatively; a gradient's difference is measured by its norm, or by a thousandth of the
global one where that is more; weights' by their norm, or by 0.02 an element. TOLERANCE of that is the same still. Adam
turns rounding into more: an element whose gradient is hardly more than rounding gets an update of full size. So layouts may
also differ by twice what one process differs by from itself when only its micro-batch size changes (`spread`). A parameter
whose gradient is nothing but rounding (key biases without rotary positions: its true gradient is zero) is below the floor
of gradients, and its weights are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.sketch import Sketch

TOLERANCE = 1e-5
GRADIENT_FLOOR = 1e-3  # of the global norm
WEIGHT_FLOOR = 0.02  # an element
NOISE = 1e-5  # of the global norm: a gradient that never gets larger is rounding


@dataclass(frozen=True)
class Trace:
    """What a training run did: a row a step, and sketches by the parameter's name."""

    losses: list[float]
    norms: list[float]
    hashes: list[str]
    gradients: list[dict[str, Sketch]]
    weights: dict[str, Sketch]
    sizes: dict[str, int]


class Allowed(NamedTuple):
    """The largest difference that is the same still."""

    loss: float = TOLERANCE
    grad_norm: float = TOLERANCE
    gradient: float = TOLERANCE
    weight: float = TOLERANCE


@dataclass(frozen=True)
class Comparison:
    """How a layout's run differs from one process."""

    layout: str
    processes: int
    loss: float  # largest relative difference
    grad_norm: float
    gradient: float  # largest, as a share of what it is measured by
    weight: float
    step: int | None  # the first step that differs by more than is allowed, from 1
    what: str  # what differs there, in words; empty: nothing
    parameters: tuple[str, ...]  # that differ there, worst first

    @property
    def same(self) -> bool:
        return not self.what


class Differences(NamedTuple):
    """Relative differences of two runs: a row a step, and by the parameter's name."""

    samples: list[bool]  # other samples
    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, float]]
    weights: dict[str, float]


def differences(one: Trace, other: Trace) -> Differences:
    floors = {name: WEIGHT_FLOOR * math.sqrt(size) for name, size in one.sizes.items()}
    return Differences(
        [a != b for a, b in zip(one.hashes, other.hashes, strict=True)],
        [_relative(a, b) for a, b in zip(one.losses, other.losses, strict=True)],
        [_relative(a, b) for a, b in zip(one.norms, other.norms, strict=True)],
        [
            _of_tensors(g, h, dict.fromkeys(g, GRADIENT_FLOOR * _norm_of_all(g)))
            for g, h in zip(one.gradients, other.gradients, strict=True)
        ],
        _of_tensors(without_noise(one), other.weights, floors),
    )


def spread(one: Trace, others: Sequence[Trace], tensor: int = 1) -> Allowed:
    """Twice the most that two runs which ought to be the same differ by, at any step; at least TOLERANCE.

    Tensor parallelism (`tensor` ranks) rounds each rank's part of a product before the sum, which no micro-batch size
    does: four times. And twice that again for single tensors, whose errors do not average out.
    """
    times = 4 if tensor > 1 else 2
    worst = [compare("", 1, a, b, Allowed()) for a, b in itertools.combinations((one, *others), 2)]
    found = [
        max((scale * getattr(c, name) for c in worst), default=0.0)
        for name, scale in (("loss", times), ("grad_norm", times), ("gradient", 2 * times), ("weight", 2 * times))
    ]
    return Allowed(*(max(TOLERANCE, value) for value in found))


def compare(layout: str, processes: int, one: Trace, other: Trace, allowed: Allowed) -> Comparison:
    """other against one process."""
    found = differences(one, other)
    steps = range(len(found.losses))
    faults = [(step + 1, *_fault_of_step(found, step, allowed)) for step in steps]
    faults.append((len(steps), *_fault_of_tensors(found.weights, allowed.weight, "final weights")))
    step, what, names = next((fault for fault in faults if fault[1]), (None, "", ()))
    largest = max(itertools.chain(*(gradients.values() for gradients in found.gradients)), default=0.0)
    heaviest = max(found.weights.values(), default=0.0)
    worst = (max(found.losses), max(found.norms), largest, heaviest)
    return Comparison(layout, processes, *worst, step, what, names)


Fault = tuple[str, tuple[str, ...]]


def _fault_of_step(found: Differences, step: int, allowed: Allowed) -> Fault:
    """What differs at a step, in words, and the parameters whose gradients do."""
    if found.samples[step]:
        return "the samples differ", ()
    what, names = _fault_of_tensors(found.gradients[step], allowed.gradient, "gradients")
    if found.losses[step] > allowed.loss:
        return "the loss differs", names
    if not what and found.norms[step] > allowed.grad_norm:
        return "the gradient norm differs, of the same gradients", ()
    return what, names


def _fault_of_tensors(found: dict[str, float], allowed: float, kind: str) -> Fault:
    worst = sorted((name for name, value in found.items() if value > allowed), key=lambda name: -found[name])
    if not worst:
        return "", ()
    count = f"all {len(worst)}" if len(worst) == len(found) else f"{len(worst)} of {len(found)}"
    return f"{count} {kind} differ", tuple(worst)


def without_noise(one: Trace) -> dict[str, Sketch]:
    """Weights but those whose gradient was rounding noise at every step. What does not learn has none."""
    norms = [_norm_of_all(gradient) for gradient in one.gradients]
    return {
        name: sketch
        for name, sketch in one.weights.items()
        if any(name not in g or _norm(g[name]) > NOISE * norm for g, norm in zip(one.gradients, norms, strict=True))
    }


def _of_tensors(one: dict[str, Sketch], other: dict[str, Sketch], floors: dict[str, float]) -> dict[str, float]:
    """floors: the least norm that a tensor's difference is measured by."""
    return {name: _norm(sketch - other[name]) / max(_norm(sketch), floors[name], 1e-30) for name, sketch in one.items()}


def _norm_of_all(gradient: dict[str, Sketch]) -> float:
    return math.sqrt(sum(_norm(sketch) ** 2 for sketch in gradient.values()))


def _norm(sketch: Sketch) -> float:
    return math.sqrt(float(sketch @ sketch))


def _relative(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf
    return abs(a - b) / max(abs(a), 1e-30)
