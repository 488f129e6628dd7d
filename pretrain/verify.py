"""`python -m pretrain verify`: that layouts train the same, shown on the user's own config.

Each layout trains the config's model from its initial weights for some steps, on processes of this machine, and is compared
with one process: loss and gradient norm of every step, every parameter's gradient, and the final weights. Tensors are
compared by sketches (`parallel.sketch`), so none is ever gathered or written.

What counts as the same, in float32: loss and gradient norm to a relative TOLERANCE; a gradient to TOLERANCE of its norm, or
of a thousandth of the global one where that is more; weights to TOLERANCE of their norm, or of 0.02 an element. A
parameter whose true gradient is zero (key biases without rotary positions) is rounding noise that Adam blows up to full
updates, whatever the layout: its gradient is below that floor, and its weights are left out. In bf16 the tolerance is twice
the difference between one-process runs that differ in micro-batch size alone, if that is more (see `spread`).
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from parallel.grid import start_grid
from parallel.layout import Layout, ParallelConfig, Problem, layout_problems, rank_and_world
from parallel.sketch import Sketch, logical_sizes, sketches
from pretrain import ranks
from pretrain.config.load import load_config, problem_error, shapes_of
from pretrain.config.run import Config
from pretrain.data.sources import Sources
from pretrain.errors import UserError
from pretrain.interrupt import Interrupt
from pretrain.train import Run

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


class Difference(NamedTuple):
    """A parameter's largest difference, as a multiple of what is allowed."""

    name: str
    excess: float
    relative: float


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


# -- a run ---------------------------------------------------------------------------------------------------------


def trace(config: Config, steps: int) -> Trace:
    """Train from the initial weights, in this rank's place. The same on every rank. Collective."""
    grid = start_grid(Layout.of(config.parallel, rank_and_world()[1]), config.parallel.timeout)
    run = Run(config, grid, Sources.open(config), Interrupt())
    beta, clip = config.optimizer.betas[0], config.optimizer.clip_norm
    found = Trace([], [], [], [], {}, {})
    before: dict[str, Sketch] = {}
    for data in run.data():
        loss = run.forward_backward(data)
        update = run.engine.step(run.learning_rate())
        run.advance(data, update)
        total, digest = run.global_facts(data, loss)
        moments = sketches(run.engine, grid, "exp_avg")
        found.losses.append(total / max(data.targets, 1.0))
        found.norms.append(update.grad_norm)
        found.hashes.append(digest)
        # Adam's first moment is a running mean of the clipped gradients, m' = beta m + (1 - beta) g, and sketches are
        # linear. A factor too many in clipping shows in the norm.
        unclipped = max(1.0, (update.grad_norm + 1e-6) / clip) / (1 - beta) if clip else 1 / (1 - beta)
        found.gradients.append({name: (m - beta * before.get(name, 0.0)) * unclipped for name, m in moments.items()})
        before = moments
        if run.state.step == steps:
            break
    found.weights.update(sketches(run.engine, grid, "weight"))
    found.sizes.update(logical_sizes(run.engine, grid))
    return found


# -- comparing -----------------------------------------------------------------------------------------------------


def compare(layout: str, processes: int, one: Trace, other: Trace, allowed: Allowed) -> Comparison:
    """other against one process."""
    losses = [_relative(a, b) for a, b in zip(one.losses, other.losses, strict=True)]
    norms = [_relative(a, b) for a, b in zip(one.norms, other.norms, strict=True)]
    gradients = [
        _differences(g, h, dict.fromkeys(g, GRADIENT_FLOOR * _norm_of_all(g)), allowed.gradient)
        for g, h in zip(one.gradients, other.gradients, strict=True)
    ]
    floors = {name: WEIGHT_FLOOR * math.sqrt(size) for name, size in one.sizes.items()}
    weights = _differences(_without_noise(one), other.weights, floors, allowed.weight)
    faults = [
        (number, *_fault_of_step(one.hashes[number - 1] == other.hashes[number - 1], *step, allowed))
        for number, step in enumerate(zip(losses, norms, gradients, strict=True), start=1)
    ]
    faults.append((len(losses), *_fault_of_tensors(weights, "final weights")))
    step, what, names = next((fault for fault in faults if fault[1]), (None, "", ()))
    largest = max((found.relative for found in itertools.chain(*gradients)), default=0.0)
    heaviest = max((found.relative for found in weights), default=0.0)
    return Comparison(layout, processes, max(losses), max(norms), largest, heaviest, step, what, names)


Fault = tuple[str, tuple[str, ...]]


def _fault_of_step(
    same_samples: bool, loss: float, norm: float, gradients: list[Difference], allowed: Allowed
) -> Fault:
    """What differs at a step, in words, and the parameters whose gradients do."""
    what, names = _fault_of_tensors(gradients, "gradients")
    if not same_samples:
        return "the samples differ", ()
    if loss > allowed.loss:
        return "the loss differs", names
    if not what and norm > allowed.grad_norm:
        return "the gradient norm differs, of the same gradients", ()
    return what, names


def _fault_of_tensors(differences: list[Difference], kind: str) -> Fault:
    worst = sorted((found for found in differences if found.excess > 1), key=lambda found: -found.excess)
    if not worst:
        return "", ()
    count = f"all {len(worst)}" if len(worst) == len(differences) else f"{len(worst)} of {len(differences)}"
    return f"{count} {kind} differ", tuple(found.name for found in worst)


class Allowed(NamedTuple):
    """The largest difference that is the same still."""

    loss: float = TOLERANCE
    grad_norm: float = TOLERANCE
    gradient: float = TOLERANCE
    weight: float = TOLERANCE


def _norm_of_all(gradient: dict[str, Sketch]) -> float:
    return math.sqrt(sum(_norm(sketch) ** 2 for sketch in gradient.values()))


def _norm(sketch: Sketch) -> float:
    return math.sqrt(float(sketch @ sketch))


def _relative(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else math.inf
    return abs(a - b) / max(abs(a), 1e-30)


def _differences(
    one: dict[str, Sketch], other: dict[str, Sketch], floors: dict[str, float], allowed: float
) -> list[Difference]:
    """floors: the least norm that a tensor's difference is measured by."""
    found = []
    for name, sketch in one.items():
        measure = max(_norm(sketch), floors[name], 1e-30)
        relative = _norm(sketch - other[name]) / measure
        found.append(Difference(name, relative / allowed, relative))
    return found


def _without_noise(one: Trace) -> dict[str, Sketch]:
    """Weights but those whose gradient was rounding noise at every step."""
    norms = [_norm_of_all(gradient) for gradient in one.gradients]
    return {
        name: sketch
        for name, sketch in one.weights.items()
        if any(_norm(g[name]) > NOISE * norm for g, norm in zip(one.gradients, norms, strict=True))
    }


# -- the command ---------------------------------------------------------------------------------------------------


def main(args: Namespace) -> int:
    """Verify the layouts of the command line; 1 if one differs."""
    source = load_config(args.config, args.overrides)
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: give at least 1")
    config = tiny(source) if args.tiny else source
    cases = _cases(config, args.layouts)
    Sources.open(config)  # what is wrong with the shards is told once, here
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{args.config}{' at tiny sizes' if args.tiny else ''}: {args.steps} steps, against one process")
    found = []
    for comparison in verify(config, cases, args.steps, args.timeout):
        found.append(comparison)
        print(line(comparison), file=sys.stderr, flush=True)
    console.print(_table(found))
    for comparison in found:
        if not comparison.same:
            console.print(f"{comparison.layout}: {_fault(comparison)}")
    if args.json:
        report = {"config": str(args.config), "tiny": args.tiny, "steps": args.steps}
        rows = [{**asdict(comparison), "same": comparison.same} for comparison in found]
        Path(args.json).write_text(json.dumps({**report, "layouts": rows}, indent=1) + "\n")
    return 0 if all(comparison.same for comparison in found) else 1


class Case(NamedTuple):
    """One layout to verify: its text, and the config under it."""

    text: str
    config: Config
    processes: int


def verify(config: Config, cases: Sequence[Case], steps: int, timeout: float) -> Iterator[Comparison]:
    """Run one process, then each case, and compare."""
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        alone = _alone(config)
        one = ranks.run_ranks(1, trace, alone, steps, folder=Path(folder), timeout=timeout)
        others = []
        if config.precision.compute != "fp32":
            others = [
                ranks.run_ranks(1, trace, with_micro(alone, size), steps, folder=Path(folder), timeout=timeout)
                for size in other_micro_sizes(config)
            ]
        for case in cases:
            try:
                run = ranks.run_ranks(case.processes, trace, case.config, steps, folder=Path(folder), timeout=timeout)
            except ranks.RankFailed as error:
                yield Comparison(
                    case.text, case.processes, math.inf, math.inf, math.inf, math.inf, None, str(error), ()
                )
                continue
            allowed = spread(one, others, case.config.parallel.tensor) if others else Allowed()
            yield compare(case.text, case.processes, one, run, allowed)


def spread(one: Trace, others: Sequence[Trace], tensor: int) -> Allowed:
    """What runs that ought to be the same differ by at most, twice; at least the usual tolerance. Tensor parallelism
    (`tensor` ranks) rounds each rank's part of a product to bf16 before the sum, which no micro-batch size does: four
    times. And twice that again for single tensors, whose errors do not average out."""
    unlimited = Allowed(math.inf, math.inf, math.inf, math.inf)
    found = [compare("", 1, one, other, unlimited) for other in others]
    times = 4 if tensor > 1 else 2
    worst = {name: max(getattr(c, name) for c in found) for name in ("loss", "grad_norm", "gradient", "weight")}
    allowed = {name: times * value for name, value in worst.items()}
    allowed |= {name: 2 * allowed[name] for name in ("gradient", "weight")}
    return Allowed(**{name: max(TOLERANCE, value) for name, value in allowed.items()})


def _alone(config: Config) -> Config:
    return config.model_copy(update={"parallel": ParallelConfig(zero=0, recompute=config.parallel.recompute)})


def other_micro_sizes(config: Config) -> list[int]:
    """The smallest, the largest and one between of the micro-batch sizes that a step could be cut into."""
    sizes = [size for size in range(1, config.batch.size + 1) if config.batch.size % size == 0]
    return sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]} - {config.batch.micro_size})


def with_micro(config: Config, size: int) -> Config:
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_size": size})})


def _cases(config: Config, texts: Sequence[str]) -> list[Case]:
    """The configs of all layouts. Raises UserError with everything that is wrong with any of them."""
    cases: list[Case] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            case = case_of(config, text)
        except ValueError as error:
            problems.append(Problem(text, str(error), ""))
            continue
        wrong = layout_problems(case.config.parallel, shapes_of(case.config), case.processes)
        problems += [problem._replace(path=f"{text}: {problem.path}") for problem in wrong]
        cases.append(case)
    if problems:
        raise problem_error("these layouts cannot be verified", problems)
    return cases


def case_of(config: Config, text: str) -> Case:
    """A layout's text, in which micro=N and recompute=KIND may stand too. Without micro, the largest micro-batch up to
    the config's that fits. Raises ValueError for what is not understood."""
    words = [word.strip() for word in text.split(",")]
    more = dict(word.split("=", 1) for word in words if word.startswith(("micro=", "recompute=")))
    layout = Layout.parse(",".join(word for word in words if word.split("=")[0] not in more))
    kind: Any = more.get("recompute", config.parallel.recompute)
    parallel = ParallelConfig(
        tensor=layout.tensor,
        sequence=layout.sequence,
        context=layout.context,
        pipeline=layout.pipeline,
        virtual=layout.virtual,
        zero=layout.zero,
        offload=layout.offload,
        recompute=kind,
        timeout=config.parallel.timeout,
    )
    under = config.model_copy(update={"parallel": parallel})
    if "micro" in more:
        return Case(text, with_micro(under, int(more["micro"])), layout.size)
    for size in range(config.batch.micro_size, 0, -1):
        fitting = with_micro(under, size)
        if not any(p.path == "batch.micro_size" for p in layout_problems(parallel, shapes_of(fitting), layout.size)):
            return Case(text, fitting, layout.size)
    return Case(text, under, layout.size)


def tiny(config: Config) -> Config:
    """The config with the same options at small sizes."""
    model, ratio = config.model, config.model.num_heads // config.model.kv_heads
    heads = max(4, ratio)
    windows = model.attention_window
    small = [None if w is None else min(w, 8) for w in (windows if isinstance(windows, list) else [windows])]
    shape = model.model_copy(
        update={
            "num_layers": 4,
            "hidden_size": 8 * heads,
            "num_heads": heads,
            "num_kv_heads": heads // ratio,
            "head_size": None,
            "ffn_hidden_size": 16 * heads,
            "max_positions": None,
            "attention_window": small if isinstance(windows, list) else small[0],
        }
    )
    return config.model_copy(
        update={
            "model": shape,
            "data": config.data.model_copy(update={"seq_length": 32}),
            "batch": config.batch.model_copy(update={"size": 8, "micro_size": 2, "ramp": None}),
        }
    )


# -- telling -------------------------------------------------------------------------------------------------------


def line(comparison: Comparison) -> str:
    return f"{comparison.layout}: {'the same' if comparison.same else _fault(comparison)}"


def _fault(comparison: Comparison) -> str:
    names = ", ".join(comparison.parameters[:3]) + (", ..." if len(comparison.parameters) > 3 else "")
    if comparison.step is None:
        return comparison.what
    return f"step {comparison.step}: {comparison.what}" + (f": {names}" if names else "")


def _table(comparisons: Sequence[Comparison]) -> Table:
    table = Table("layout", "processes", "loss", "gradient norm", "gradients", "weights", "")
    for c in comparisons:
        numbers = (f"{value:.1e}" for value in (c.loss, c.grad_norm, c.gradient, c.weight))
        table.add_row(
            c.layout,
            str(c.processes),
            *numbers,
            "same" if c.same else f"parts at step {c.step}" if c.step else "failed",
        )
    return table


def _verdict(comparison: Comparison) -> str:
    if comparison.same:
        return "same"
    return "failed" if comparison.step is None else f"parts at step {comparison.step}"
