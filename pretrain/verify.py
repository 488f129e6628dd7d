"""`python -m pretrain verify`: that layouts train the same, shown on the user's own config.

Each layout trains the config's model from its initial weights for some steps, on processes of this machine, and is compared
with one process: loss and gradient norm of every step, every parameter's gradient, and the final weights. Tensors are
compared by sketches (`parallel.sketch`), so none is ever gathered or written. What counts as the same: `pretrain.comparison`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from parallel.grid import start_grid
from parallel.layout import Layout, ParallelConfig, Problem, rank_and_world
from parallel.sketch import Sketch, logical_sizes, sketches
from pretrain import ranks
from pretrain.build import stage_layers
from pretrain.comparison import Comparison, Trace, compare, spread
from pretrain.config.data import Phase
from pretrain.config.duration import Span
from pretrain.config.load import fitting_problems, load_config, problem_error
from pretrain.config.run import Config
from pretrain.data.sources import Sources
from pretrain.errors import UserError
from pretrain.inherit import with_initial
from pretrain.interrupt import Interrupt
from pretrain.train import Run
from pretrain.trainable import check_trainable


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
        norm = update.grad_norm.item()
        run.advance(data, update)
        losses, digest = run.global_facts(data, loss)
        moments = sketches(run.engine, grid, "exp_avg")
        found.losses.append(sum(losses.values()))
        found.norms.append(norm)
        found.hashes.append(digest)
        # Adam's first moment is a running mean of the clipped gradients, m' = beta m + (1 - beta) g, and sketches are
        # linear. A factor too many in clipping shows in the norm.
        unclipped = max(1.0, (norm + 1e-6) / clip) / (1 - beta) if clip else 1 / (1 - beta)
        found.gradients.append({name: (m - beta * before.get(name, 0.0)) * unclipped for name, m in moments.items()})
        before = moments
        if run.state.step == steps:
            break
    found.weights.update(sketches(run.engine, grid, "weight"))
    found.sizes.update(logical_sizes(run.engine, grid))
    return found


# -- the command ---------------------------------------------------------------------------------------------------


def main(args: Namespace) -> int:
    """Verify the layouts of the command line; 1 if one differs."""
    source = with_initial(load_config(args.config, args.overrides))
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: give at least 1")
    config = tiny(source) if args.tiny else source
    cases = _cases(config, args.layouts)
    sources = Sources.open(config)  # what is wrong with the shards is told once, here
    for case in cases:
        layout, layers = (
            Layout.of(case.config.parallel, case.processes),
            stage_layers(case.config, sources.sizes.vocab_size),
        )
        check_trainable(case.config, sources.sizes, layout, layers)
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
    """Run one process, once more with other micro-batch sizes, then each case, and compare."""
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        folder = Path(name)

        def run(config: Config, processes: int) -> Trace:
            config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder / "run")})})
            found: Trace = ranks.run_ranks(processes, trace, config, steps, folder=folder, timeout=timeout)
            return found

        alone = _alone(config)
        one = run(alone, 1)
        others = [run(with_micro(alone, size), 1) for size in other_micro_sizes(config)]
        for case in cases:
            try:
                other = run(case.config, case.processes)
            except ranks.RankFailed as error:
                inf = math.inf
                yield Comparison(case.text, case.processes, inf, inf, inf, inf, None, str(error), ())
                continue
            yield compare(case.text, case.processes, one, other, spread(one, others, case.config.parallel.tensor))


def _alone(config: Config) -> Config:
    return config.model_copy(update={"parallel": ParallelConfig(zero=0, recompute=config.parallel.recompute)})


def other_micro_sizes(config: Config) -> list[int]:
    """The smallest, the largest and one between of the micro-batch sizes that a step could be cut into."""
    sizes = [size for size in range(1, config.batch.size + 1) if config.batch.size % size == 0]
    return sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]} - {config.batch.micro_size})


def with_micro(config: Config, size: int) -> Config:
    """The config with micro-batches of `size` in every phase."""
    phases = [phase.model_copy(update={"micro_size": None}) for phase in config.data.phases]
    data = config.data.model_copy(update={"phases": phases})
    return config.model_copy(update={"data": data, "batch": config.batch.model_copy(update={"micro_size": size})})


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
        wrong = fitting_problems(case.config, case.processes)
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
        if not any(p.path.endswith("batch.micro_size") for p in fitting_problems(fitting, layout.size)):
            return Case(text, fitting, layout.size)
    return Case(text, under, layout.size)


def tiny(config: Config) -> Config:
    """The config with the same options at small sizes."""
    model, ratio = config.model, config.model.num_heads // config.model.kv_heads
    heads = max(4, ratio)
    windows = model.attention_window
    small = [None if w is None else min(w, 8) for w in (windows if isinstance(windows, list) else [windows])]
    pairs = model.kind == "encoder-decoder"
    shape = model.model_copy(
        update={
            "num_layers": 2 if pairs else 4,
            "decoder_layers": 2 if pairs else None,
            "hidden_size": 8 * heads,
            "num_heads": heads,
            "num_kv_heads": heads // ratio,
            "head_size": None,
            "ffn_hidden_size": 16 * heads,
            "max_positions": None,
            "attention_window": small if isinstance(windows, list) else small[0],
            "reset": "all" if model.initial is not None else 0,  # whose weights are of other sizes
        }
    )
    return config.model_copy(
        update={
            "model": shape,
            "data": config.data.model_copy(update={"seq_length": _short(config), "phases": _brief(config)}),
            "objective": config.objective.model_copy(update={"source_length": None}),
            "batch": config.batch.model_copy(update={"size": 8, "micro_size": 2, "ramp": None}),
        }
    )


def _short(config: Config) -> int:
    """A sequence length from 32 on whose source and target, if it has such, can be cut as 32 can."""
    if config.model.kind != "encoder-decoder" or config.objective.kind == "sequence-to-sequence":
        return 32
    return next(length for length in count(32) if not any(part % 8 for part in config.objective.lengths(length)))


def _brief(config: Config) -> list[Phase]:
    """The phases at a tiny length and batch, over after two steps each, so that a few steps see them all."""
    changes = {"seq_length": 16, "length": Span(2, "steps"), "micro_size": None}
    sizes = [None if phase.batch_size is None else 16 for phase in config.data.phases]
    return [
        phase.model_copy(update={**changes, "batch_size": size})
        for phase, size in zip(config.data.phases, sizes, strict=True)
    ]


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
