"""Training runs for tests: the real `Run`, with what it would report collected, and the comparison of two of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.boxes import whole_tensors
from parallel.grid import start_grid
from parallel.layout import Layout, rank_and_world
from pretrain import runs
from pretrain.data.sources import Sources
from pretrain.interrupt import Interrupt
from pretrain.report import Silent
from pretrain.train import Run, train
from pretrain.validation import Result

TINY = """
version: 1
model: {kind: gpt, num_layers: 4, hidden_size: 32, num_heads: 4, num_kv_heads: 4, ffn_hidden_size: 64, positions: rope,
        norm: rms, activation: swiglu, tie_embeddings: true, dropout: 0.1}
data: {train: SHARDS/train, validation: SHARDS/validation, seq_length: 32}
objective: {kind: causal, loss_across_documents: false}
batch: {size: 8, micro_size: 1}
optimizer: {kind: adamw, learning_rate: 1.0e-2, betas: [0.9, 0.95], weight_decay: 0.1, clip_norm: 1.0}
schedule: {kind: cosine, warmup: 2 steps, total: 10 steps, final_fraction: 0.1}
parallel: {zero: 0}
precision: {compute: fp32, compile: never}
checkpoint: {every: 100 steps, keep_last: 2}
monitor: {log_every: 1 steps, tensorboard: false}
run: {dir: RUN, seed: 1}
"""


class Recorder(Silent):
    """Keeps every logged step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, **fields: Any) -> None:
        self.logged.append(fields)


def write_config(folder: Path, shards: Path, **replace: str) -> Path:
    """The tiny config in a file; `replace` exchanges text in it."""
    text = TINY.replace("SHARDS", str(shards)).replace("RUN", str(folder / "run"))
    for old, new in replace.items():
        text = text.replace(old, new)
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def start_run(config_path: str, overrides: list[str]) -> Run:
    """The run of this rank's place, ready to be resumed and trained."""
    torch.set_num_threads(1)
    world = rank_and_world()[1]
    config = runs.open_config(config_path, overrides, world)
    sources = Sources.open(config)
    grid = start_grid(Layout.of(config.parallel, world), 60)
    run = Run(config, grid, sources, Interrupt())
    runs.claim_folder(config, grid, sources)
    return run


def run_training(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Train in this rank's place: what was logged, and which libraries' engines were called."""
    calls = count_calls()
    run = start_run(config_path, overrides)
    run.reporter = recorder = Recorder()
    run.resume()
    train(run)
    return {"logged": recorder.logged, "calls": dict(calls)}


def count_calls() -> dict[str, int]:
    """Counters on megatron-core's pipeline schedules and DeepSpeed's step, for this process."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from megatron.core.pipeline_parallel import schedules

    calls: dict[str, int] = {}

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **options)

        setattr(owner, name, call)

    counted(schedules, "forward_backward_pipelining_without_interleaving")
    counted(schedules, "forward_backward_pipelining_with_interleaving")
    counted(DeepSpeedEngine, "step")
    return calls


TOLERANCE = 1e-5  # relative, of float32 sums in another order


# -- the same training under two layouts -----------------------------------------------------------------------------


class Course(NamedTuple):
    """How a run went. The tensors are whole logical ones, on rank 0 alone."""

    logged: list[dict[str, Any]]
    validated: list[float]  # validation losses
    calls: dict[str, int]
    gradients: dict[str, Tensor]  # of the first step, as the optimizer saw them, without the clipping's factor
    weights: dict[str, Tensor]  # masters at the end
    moments: dict[str, Tensor]  # AdamW's first moments at the end
    counts: list[float]  # targets that count in each micro-batch of training of this rank


class Watcher(Recorder):
    """Also keeps validations, and the gradients of the first step."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.validated: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def validation(self, step: int, tokens: int, result: Result) -> None:
        self.validated.append(result.loss)

    def log(self, **fields: Any) -> None:
        super().log(**fields)
        if len(self.logged) == 1:
            optimizer = self.run.config.optimizer
            # torch's clip_grad_norm_ multiplies by clip_norm / (norm + 1e-6), the moment by 1 - beta1.
            clipped = min(1.0, optimizer.clip_norm / (fields["grad_norm"] + 1e-6)) * (1 - optimizer.betas[0])
            whole = whole_tensors(self.run.engine, self.run.grid)
            self.gradients = {name: kinds["exp_avg"] / clipped for name, kinds in whole.items()}


def follow_training(config_path: str, overrides: list[str]) -> Course:
    """Train in this rank's place, with all that two layouts are compared by."""
    calls = count_calls()
    run = start_run(config_path, overrides)
    run.reporter = watcher = Watcher(run)
    counts: list[float] = []
    run_schedule = run.built.schedule.run

    def counted(batches: Any, **options: Any) -> Tensor:
        if not options.get("forward_only"):
            counts.extend(float(batch.mask.sum()) for batch in batches)
        return run_schedule(batches, **options)

    run.built.schedule.run = counted  # type: ignore[method-assign]
    train(run)
    whole = whole_tensors(run.engine, run.grid)
    weights, moments = ({name: kinds[kind] for name, kinds in whole.items()} for kind in ("weight", "exp_avg"))
    return Course(watcher.logged, watcher.validated, dict(calls), watcher.gradients, weights, moments, counts)


def distance(one: Course, other: Course) -> dict[str, float]:
    """How far two courses lie apart, relatively: the worst step's loss and norm, all gradients and all weights."""
    apart = {}
    for field in ("loss", "grad_norm"):
        pairs = zip(one.logged, other.logged, strict=True)
        apart[field] = max(abs(right[field] / left[field] - 1) for left, right in pairs)
    for kind in ("gradients", "weights"):
        ours, theirs = getattr(one, kind), getattr(other, kind)
        apart[kind] = _total({name: theirs[name] - ours[name] for name in ours}) / _total(ours)
    return apart


def noise_alone(course: Course) -> set[str]:
    """Tensors whose gradient is rounding noise from the first step to the last. AdamW divides a gradient by its own
    size, so it moves such weights at random under every layout; nothing that they do to the loss can be seen."""
    return {
        name
        for name in course.weights
        if _size(course.gradients[name]) < 1e-6 * _total(course.gradients)
        and _size(course.moments[name]) < 1e-6 * _total(course.moments)
    }


def differences(expected: Course, found: Course, exempt: Collection[str] = ()) -> Iterator[str]:
    """In which numbers two courses of the same training differ by more than reordered sums can, in float32.

    exempt: tensors whose weights are not compared (their gradients are).
    """
    for field in ("loss", "grad_norm"):
        for one, other in zip(expected.logged, found.logged, strict=True):
            if not abs(other[field] - one[field]) <= TOLERANCE * one[field]:
                yield f"step {one['step']}: {field} {other[field]}, expected {one[field]}"
    for number, (one, other) in enumerate(zip(expected.validated, found.validated, strict=True)):
        if not abs(other - one) <= TOLERANCE * one:
            yield f"validation {number}: {other}, expected {one}"
    for field in ("batch_hash", "learning_rate", "samples", "tokens", "batch_size"):
        if [step[field] for step in expected.logged] != [step[field] for step in found.logged]:
            yield f"{field} differs"
    yield from _tensor_differences(expected, found, exempt)


def _tensor_differences(expected: Course, found: Course, exempt: Collection[str]) -> Iterator[str]:
    """By a tensor's own size, with the floors below which a difference is no matter to the training."""
    for kind in ("gradients", "moments", "weights"):
        ours, theirs = getattr(expected, kind), getattr(found, kind)
        if ours.keys() != theirs.keys():
            yield f"{kind}: other tensors, {sorted(ours.keys() ^ theirs.keys())}"
            continue
        total = _total(ours)
        for name, tensor in ours.items():
            if kind == "weights" and name in exempt:
                continue
            floor = 0.02 * tensor.numel() ** 0.5 if kind == "weights" else 1e-3 * total
            error = _size(theirs[name] - tensor)
            if not error <= TOLERANCE * max(_size(tensor), floor):  # so that nan is a difference
                yield f"{kind}: {name} is off by {error:.2e} of {_size(tensor):.2e}"


def _size(tensor: Tensor) -> float:
    return tensor.double().norm().item()


def _total(tensors: dict[str, Tensor]) -> float:
    return sum(_size(tensor) ** 2 for tensor in tensors.values()) ** 0.5
