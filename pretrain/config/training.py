"""Batches, optimizer, schedule, precision and the run's own settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from parallel.layout import Problem
from pretrain.config.duration import Duration, Interval, Span
from pretrain.config.section import Section, meaning


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"expected two numbers such as [0.9, 0.95], found {value!r:.60}")
    return tuple(value)  # YAML has lists only


class Ramp(Section):
    """Batch-size warm-up in equal steps of size, spread evenly over its length (GPT-3, section 2.3)."""

    start: int = meaning(..., "sequences a step at first", ge=1)
    increment: int = meaning(..., "sequences added at a time", ge=1)
    length: Duration = meaning(..., "when the full size is reached, in steps or tokens")


class BatchConfig(Section):
    """Sequences a step."""

    size: int = meaning(16, "sequences a step over all ranks", ge=1)
    micro_size: int = meaning(16, "sequences that a rank computes at once; the rest of its share accumulates", ge=1)
    ramp: Ramp | None = meaning(None, "batch-size warm-up, {start, increment, length}; null: none")

    def problems(self) -> Iterator[Problem]:
        ramp = self.ramp
        if ramp is not None and ramp.length.unit == "epochs":
            yield Problem("ramp.length", f"{ramp.length}: a ramp is not in epochs", "give steps or tokens")
        if ramp is not None and ramp.start > self.size:
            yield Problem("ramp.start", f"{ramp.start} is above batch.size {self.size}", "start with less")
        elif ramp is not None and (self.size - ramp.start) % ramp.increment:
            message = f"from {ramp.start} by {ramp.increment} never reaches batch.size {self.size}"
            yield Problem("ramp.increment", message, f"choose one that divides {self.size - ramp.start}")


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2019); no decay on norms and biases."""

    kind: Literal["adamw"] = meaning("adamw", "adamw")
    learning_rate: float = meaning(1e-3, "highest learning rate", gt=0)
    betas: Annotated[tuple[float, float], BeforeValidator(_pair)] = meaning(
        (0.9, 0.95), "decay rates of the two moments, each in [0, 1)"
    )
    epsilon: float = meaning(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = meaning(0.1, "times the learning rate, taken off the weights each step", ge=0)
    layer_decay: float = meaning(
        1.0, "learning rate of each block as a share of the one above it; the embeddings' is the lowest", gt=0, le=1
    )
    clip_norm: float = meaning(1.0, "gradients are scaled down to this global norm; 0: never", ge=0)
    mixout: float = meaning(
        0.0,
        "probability with which a weight of the layers is the initial model's in a training step (Lee et al. 2020); 0: never",
        ge=0,
        lt=1,
    )
    freeze: int | list[str] = meaning(
        0,
        "weights that do not learn: so many layers from the bottom, the embeddings with them, or a list of names such as "
        'embedding, blocks.0 or "blocks.*.bias", each with all that is below it; 0: none',
    )

    def problems(self) -> Iterator[Problem]:
        if isinstance(self.freeze, int) and self.freeze < 0:
            yield Problem("freeze", f"{self.freeze} layers", "give 0 or more, or a list of names")
        if not all(0 <= beta < 1 for beta in self.betas):
            yield Problem(
                "betas", f"{list(self.betas)}: each must be at least 0 and below 1", "the usual are [0.9, 0.95]"
            )


class ScheduleConfig(Section):
    """The learning rate over the run."""

    kind: Literal["cosine", "linear", "inverse-sqrt", "wsd", "constant"] = meaning(
        "cosine", "cosine, linear, inverse-sqrt (Noam, 2017), wsd (warm-up, stable, decay) or constant"
    )
    warmup: Duration = meaning(Span(0, "steps"), "linear warm-up from 0, in steps or tokens")
    total: Interval = meaning(Span(200, "steps"), "length of the run, in steps or tokens")
    decay: Duration | None = meaning(
        None,
        "cosine, linear: until the final rate (null: total); wsd: length of the decay at the end (null: total / 10)",
    )
    final_fraction: float = meaning(0.1, "cosine, linear, wsd: last learning rate / highest", ge=0, le=1)

    def problems(self) -> Iterator[Problem]:
        if self.kind == "inverse-sqrt" and self.warmup.count == 0:
            yield Problem("warmup", "inverse-sqrt falls from the end of the warm-up", "give one of at least a step")
        if self.decay is not None and self.kind in ("constant", "inverse-sqrt"):
            yield Problem("decay", f"has no effect with kind: {self.kind}", "remove it")


class PrecisionConfig(Section):
    """Number formats; master weights and optimizer state are always fp32."""

    compute: Literal["auto", "bf16", "fp32"] = meaning(
        "auto",
        "of weights, activations and products: bf16, fp32, or auto (bf16 where it is faster, else fp32)",
    )
    compile: Literal["auto", "always", "never"] = meaning(
        "auto", "torch.compile: auto (where it works and a compiler is found), always or never"
    )


class CheckpointConfig(Section):
    """Checkpoints; the last step is always saved."""

    every: Interval = meaning(Span(500, "steps"), "between checkpoints, in steps or tokens")
    keep_last: int = meaning(2, "newest checkpoints that are kept", ge=1)
    keep_every: Interval | None = meaning(
        None, "also keep, for ever, the checkpoint where each such interval of steps or tokens ends; null: none"
    )
    keep_best: bool = meaning(True, "also keep the step with the best validation loss; it is saved when it is found")


class RunConfig(Section):
    """The run's folder and what concerns it as a whole."""

    def problems(self) -> Iterator[Problem]:
        if self.stop_at is not None and self.stop_share is None:
            yield Problem("stop_at", f"{self.stop_at!r} is no share of the schedule", 'write "0.3 of total"')

    @property
    def stop_share(self) -> float | None:
        """Of the schedule's steps, between 0 and 1."""
        found = re.fullmatch(r"(0?\.\d{1,12}) of total", self.stop_at or "")
        return float(found[1]) if found else None

    dir: str = meaning("runs/run", "folder of the run; made when missing, resumed when there")
    seed: int = meaning(1, "of initial weights, data order and dropout", ge=0, lt=2**63)
    stop_at: str | None = meaning(
        None, 'end this session, saved, at a share of the schedule, "0.3 of total"; the next goes on; null: never'
    )
    on_spike: Literal["ignore", "skip", "rewind"] = meaning(
        "ignore",
        "what a loss far above the recent ones does: ignore, skip (the step changes nothing) or rewind (back to the newest good "
        "checkpoint, and past the samples since; also where max_bad_steps is reached); the last two read the loss every step",
    )
    spike_factor: float = meaning(8.0, "how far is far: times the mean distance of recent losses from their mean", gt=1)
    max_rewinds: int = meaning(3, "times that a run goes back; after them a spike is skipped", ge=0)
    max_bad_steps: int = meaning(
        5, "stop after so many steps in a row without a finite gradient, as seen when a step is logged", ge=1
    )
