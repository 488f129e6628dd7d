"""The matrix of layouts: every accepted combination up to eight processes, and a small set that covers every pair.

    python -m tests.matrix [--steps 20]      # all of it; writes docs/layouts.md (`make matrix`)

Models differ from combination to combination (positions, norms, tied or not, grouped heads), as do micro-batch sizes,
recomputation and precision. Everywhere: dropout, targets that differ in number, clipping, and a batch ramp.

Weights are larger and epsilon is, so that Adam makes little of rounding: at 1e-8 an element whose gradient is hardly more
than rounding gets a full update, and one process differs by more than 1e-5 from itself (docs/log.md).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from parallel.layout import Layout, layout_problems
from pretrain import comparison, verify
from pretrain.config.load import load_config, shapes_of
from pretrain.config.run import Config
from pretrain.data.prepare import Options, prepare
from tests.distributed import REPOSITORY, run_ranks, stop_zygotes

MOST_PROCESSES = 8
SEED = 4
CONFIG = """
version: 1
model: {kind: gpt, num_layers: 5, hidden_size: 32, num_heads: 4, dropout: 0.1, initial_scale: 0.1}
data: {train: SHARDS/train, seq_length: 32}
objective: {kind: causal, loss_across_documents: false}
batch: {size: 8, micro_size: 8, ramp: {start: 4, increment: 4, length: 3 steps}}
optimizer: {kind: adamw, learning_rate: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip_norm: 1.0,
            epsilon: 1.0e-5}
schedule: {kind: cosine, warmup: 2 steps, total: 1000 steps, final_fraction: 0.1}
parallel: {zero: 0}
precision: {compute: fp32, compile: never}
run: {dir: nowhere, seed: 1}
"""
MODELS = {
    "llama": "model.positions=rope model.norm=rms model.activation=swiglu model.biases=false model.num_kv_heads=2 "
    "objective.attention_across_documents=false",
    "gpt2": "model.positions=learned model.activation=gelu-tanh objective.attention_across_documents=false",
    "untied": "model.positions=alibi model.norm=rms model.activation=geglu model.tie_embeddings=false",
    "bert": "model.kind=bert model.norm_position=post objective.kind=masked objective.loss_across_documents=true "
    "objective.pairs=next",
    "2017": "model.kind=encoder-decoder model.num_layers=2 model.decoder_layers=3 model.positions=sinusoidal "
    "model.norm_position=post model.activation=relu model.attention_window=[null,8] model.scale_embeddings=true "
    "objective.kind=prefix objective.loss_across_documents=true objective.label_smoothing=0.1",
    "t5": "model.kind=encoder-decoder model.num_layers=2 model.decoder_layers=3 model.positions=rope model.norm=rms "
    "model.activation=swiglu model.biases=false model.num_kv_heads=2 model.tie_embeddings=false "
    "objective.kind=span-corruption objective.loss_across_documents=true objective.attention_across_documents=false "
    "objective.noise_rate=0.375 objective.noise_span=4.0",
}
AXES: dict[str, tuple[str, ...]] = {
    "tensor": ("", "tp=2", "tp=4", "tp=2,sp", "tp=4,sp"),
    "context": ("", "cp=2", "cp=4"),
    "pipeline": ("", "pp=2", "pp=4", "pp=2,vp=2"),
    "data": ("", "dp=2", "dp=4"),
    "zero": ("zero=0", "zero=1", "zero=2", "zero=3", "zero=2,offload", "zero=3,offload"),
    "micro": ("micro=1", "micro=2"),
    "recompute": ("recompute=none", "recompute=selective", "recompute=full"),
    "model": tuple(MODELS),
    "precision": ("fp32", "bf16"),
}


@dataclass(frozen=True)
class Combination:
    """A value of each axis."""

    values: tuple[str, ...]

    @property
    def layout(self) -> str:
        return ",".join(filter(None, self.values[:-2]))

    @property
    def model(self) -> tuple[str, str]:
        """What the one-process run depends on."""
        return self.values[-2], self.values[-1]

    @property
    def processes(self) -> int:
        return _size(self.values[:4])

    @property
    def cost(self) -> float:
        """Of a run, in processes that start and end (half a second here). ZeRO-3's hooks are Python around each module:
        they take as long in each micro-batch of its steps."""
        micro_batches = 8 / _size(self.values[3:4]) / int(self.values[5].removeprefix("micro="))
        return self.processes * (1 + micro_batches * (1 if "zero=3" in self.values[4] else 0.125))

    def __str__(self) -> str:
        return " ".join(filter(None, [*self.values[:-2], *self.model]))

    def pairs(self) -> Iterator[tuple[int, str, int, str]]:
        for (i, a), (j, b) in itertools.combinations(enumerate(self.values), 2):
            yield i, a, j, b


@lru_cache
def _size(degrees: tuple[str, ...]) -> int:
    return Layout.parse(",".join(degrees)).size


def write_shards(out: Path) -> None:
    """Paragraphs of the standard library's small modules: most sequences hold a document's end."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    small = (path for path in sorted(folder.glob("*.py")) if 2_000 < path.stat().st_size < 12_000)
    files = [path for path, _ in zip(small, range(30), strict=False)]
    options = Options(vocab_size=512, validation=0.05, tokens_per_chunk=4096, split="blank-line")
    prepare(files, out, options, processes=1, say=lambda _: None)


def config_of(folder: Path, model: tuple[str, str]) -> Config:
    """folder: holds shards/."""
    path = folder / "matrix.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(folder / "shards")))
    name, compute = model
    return load_config(path, [*MODELS[name].split(), f"precision.compute={compute}"])


@lru_cache
def accepted() -> list[Combination]:
    """Every combination that fits and is accepted, in a fixed order."""
    with tempfile.TemporaryDirectory() as folder:
        configs = {model: config_of(Path(folder), model) for model in itertools.product(MODELS, AXES["precision"])}
    every = map(Combination, itertools.product(*AXES.values()))
    return [c for c in every if c.processes <= MOST_PROCESSES and _fits(c, configs[c.model])]


def _fits(combination: Combination, config: Config) -> bool:
    case = verify.case_of(config, combination.layout)
    return not layout_problems(case.config.parallel, shapes_of(case.config), case.processes)


def each_layout() -> list[Combination]:
    """Each accepted combination of the layout's own axes once, the others drawn with a fixed seed."""
    drawn = random.Random(SEED)
    groups: dict[tuple[str, ...], list[Combination]] = {}
    for combination in accepted():
        groups.setdefault(combination.values[:5], []).append(combination)
    return [drawn.choice(group) for group in groups.values()]


def covering() -> list[Combination]:
    """A small and cheap set in which every pair of values that is accepted together stands together; the same every time.

    The next one has the most new pairs for its cost. What it would bring only falls as others are chosen, so most need
    not be looked at again.
    """
    combinations = random.Random(SEED).sample(accepted(), len(accepted()))
    pairs = [frozenset(combination.pairs()) for combination in combinations]
    missing = set().union(*pairs)
    waiting = [(-math.inf, number) for number in range(len(combinations))]  # the most that each may bring, negated
    chosen = []
    while missing:
        _, number = heapq.heappop(waiting)
        # A higher power would choose many more of few processes.
        worth = -len(missing & pairs[number]) / combinations[number].cost ** 0.3
        if waiting and worth > waiting[0][0]:
            heapq.heappush(waiting, (worth, number))
        else:
            chosen.append(combinations[number])
            missing -= pairs[number]
    return chosen


class Matrix:
    """Runs combinations against their one-process runs, each of which is made once."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._alone: dict[tuple[str, str], tuple[comparison.Trace, list[comparison.Trace]]] = {}

    def compare(self, combination: Combination) -> comparison.Comparison:
        config = config_of(self.folder, combination.model)
        one, others = self._one_process(config, combination.model)
        case = verify.case_of(config, combination.layout)
        run = run_ranks(case.processes, verify.trace, case.config, self.steps, timeout=300)[0]
        allowed = comparison.spread(one, others, case.config.parallel.tensor)
        return comparison.compare(str(combination), case.processes, one, run, allowed)

    def _one_process(self, config: Config, model: tuple[str, str]) -> tuple[comparison.Trace, list[comparison.Trace]]:
        if model not in self._alone:
            sizes = (2, 1, 4, 8) if model[1] == "bf16" else (2,)
            one, *rest = (
                run_ranks(1, verify.trace, verify.with_micro(config, size), self.steps, timeout=300)[0]
                for size in sizes
            )
            self._alone[model] = one, rest
        return self._alone[model]


def main() -> int:
    parser = argparse.ArgumentParser(description="Every layout against one process; writes docs/layouts.md.")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run (default: 20)")
    parser.add_argument("--limit", type=int, help="only so many, for a trial; writes nothing")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        write_shards(Path(name) / "shards")
        matrix = Matrix(Path(name), args.steps)
        combinations = each_layout()[: args.limit]
        for number, combination in enumerate(combinations, start=1):
            found.append(matrix.compare(combination))
            print(f"{number}/{len(combinations)} {verify.line(found[-1])}", file=sys.stderr, flush=True)
    stop_zygotes()
    if args.limit is None:
        (REPOSITORY / "docs" / "layouts.md").write_text(_document(found, args.steps))
    return 0 if all(one.same for one in found) else 1


def _document(found: Sequence[comparison.Comparison], steps: int) -> str:
    same = sum(one.same for one in found)
    rows = "\n".join(
        f"| {c.layout} | {c.processes} | {c.loss:.0e} | {c.grad_norm:.0e} | {c.gradient:.0e} | {c.weight:.0e} "
        f"| {'yes' if c.same else f'no: {c.what}'} |"
        for c in found
    )
    return f"""# Layouts

Written by `make matrix`: each accepted combination of tensor, sequence, context, pipeline, interleaved, data parallelism and
ZeRO stage up to eight processes, {steps} steps on CPU against one process. Micro-batch size, recomputation, model and
precision are drawn for each with a fixed seed. Largest relative differences; what counts as the same is in
`pretrain/comparison.py`. {same} of {len(found)} are the same.

| combination | processes | loss | gradient norm | a gradient | a weight | same |
|---|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    sys.exit(main())
