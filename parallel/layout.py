"""The layout of a run: its degrees of parallelism, as a small value that prints itself. Imports no torch.

Ranks = tensor x context x pipeline x data. Data parallelism is what the other degrees leave of the number of processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class ParallelConfig(BaseModel):
    """Degrees of parallelism; data parallelism is what is left of the processes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    tensor: int = Field(1, ge=1, description="ranks that share each layer's weights (Shoeybi et al. 2019)")
    sequence: bool = Field(
        False, description="tensor ranks also share the sequence between the layers (Korthikanti et al. 2022)"
    )
    context: int = Field(
        1,
        ge=1,
        description='ranks that share each sequence, and exchange heads for attention (Jacobs et al. 2023, "Ulysses")',
    )
    pipeline: int = Field(1, ge=1, description="stages that the layers are cut into (1F1B; Narayanan et al. 2021)")
    virtual: int = Field(1, ge=1, description="parts of the layers a pipeline rank holds, interleaved; 1: one")
    layers: list[int] | None = Field(
        None, description="layers of each part of the pipeline, in order; null: balanced, the head's cost weighed in"
    )
    zero: int = Field(
        1,
        ge=0,
        le=3,
        description="ZeRO stage: what data-parallel ranks share of 1 the optimizer, 2 gradients, 3 weights",
    )
    offload: bool = Field(False, description="ZeRO 2 and 3: optimizer state and its step in the host's memory")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations made again in the backward pass: none, selective (attention) or full (each layer)",
    )
    timeout: float = Field(600.0, gt=0, description="seconds after which a rank that waits for the others gives up")


@dataclass(frozen=True)
class Layout:
    """Degrees of each parallelism. Prints as `tp2 x pp2 x dp4, zero 1`."""

    tensor: int = 1
    sequence: bool = False
    context: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    zero: int = 0
    offload: bool = False

    @property
    def size(self) -> int:
        """Processes that it needs."""
        return self.tensor * self.context * self.pipeline * self.data

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int) -> Layout:
        """The layout of `world` processes. ValueError if they cannot be shared out evenly."""
        model = parallel.tensor * parallel.context * parallel.pipeline
        if world % model:
            raise ValueError(f"{world} processes are not a multiple of tensor x context x pipeline = {model}")
        return cls(
            parallel.tensor,
            parallel.sequence,
            parallel.context,
            parallel.pipeline,
            parallel.virtual,
            world // model,
            parallel.zero,
            parallel.offload,
        )

    @classmethod
    def parse(cls, text: str) -> Layout:
        """A layout of one string: `tp=2,sp,cp=2,pp=2,vp=2,dp=2,zero=2,offload`; what is not named is 1, zero is 0."""
        names = {"tp": "tensor", "cp": "context", "pp": "pipeline", "vp": "virtual", "dp": "data", "zero": "zero"}
        degrees: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            match = re.fullmatch(r"([a-z]+)=?(\d+)", part)
            if part in ("sp", "offload"):
                degrees["sequence" if part == "sp" else part] = True
            elif match and match[1] in names:
                degrees[names[match[1]]] = int(match[2])
            else:
                raise ValueError(
                    f"layout {text!r}: {part!r} is none of {', '.join(f'{n}=N' for n in names)}, sp or offload"
                )
        return cls(**degrees)

    def __str__(self) -> str:
        degrees = {"tp": self.tensor, "cp": self.context, "pp": self.pipeline, "vp": self.virtual, "dp": self.data}
        parts = [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]
        if self.sequence:
            parts.insert(1, "sp")
        return f"{' x '.join(parts) or '1 process'}, zero {self.zero}{' offloaded' if self.offload else ''}"


def rank_and_world() -> tuple[int, int]:
    """What the launcher (torchrun's variables) says of this process; 0 of 1 without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Problem(NamedTuple):
    """Why a layout does not fit: the field, what is wrong, and how to mend it."""

    path: str
    message: str
    mend: str


class Shapes(NamedTuple):
    """Numbers of a run that its layout has to divide."""

    num_layers: int
    num_heads: int
    kv_heads: int
    feed_forward_size: int
    seq_length: int
    batch_sizes: tuple[int, ...]  # sequences a step: the full size and, with a ramp, each size on the way
    micro_size: int


def layout_problems(parallel: ParallelConfig, shapes: Shapes, world: int) -> list[Problem]:
    """Everything that keeps a run of these shapes from `world` processes under this layout; empty if it fits."""
    return [
        *_zero(parallel),
        *_tensor(parallel, shapes),
        *_context(parallel, shapes),
        *_pipeline(parallel, shapes),
        *_batch(parallel, shapes, world),
    ]


def _zero(parallel: ParallelConfig) -> Iterator[Problem]:
    if parallel.zero > 1 and parallel.pipeline > 1:
        yield Problem(
            "parallel.zero",
            f"stage {parallel.zero} shares out gradients while a pipeline still adds to them: wrong norms",
            "set parallel.zero=1, or parallel.pipeline=1",
        )
    if parallel.offload and parallel.zero < 2:
        yield Problem(
            "parallel.offload",
            f"at ZeRO stage {parallel.zero} the optimizer cannot step in the host's memory",
            "set parallel.zero=2, or parallel.offload=false",
        )


def _tensor(parallel: ParallelConfig, shapes: Shapes) -> Iterator[Problem]:
    degree = parallel.tensor
    extents = {
        "model.num_heads": shapes.num_heads,
        "model.num_kv_heads": shapes.kv_heads,
        "model.ffn_hidden_size": shapes.feed_forward_size,
    }
    if parallel.sequence:
        extents["data.seq_length"] = shapes.seq_length
    for path, extent in extents.items():
        if extent % degree:
            yield Problem(
                "parallel.tensor",
                f"{degree} does not divide {path} {extent}",
                f"the nearest that works: {_fits(extents, degree)}",
            )
    if 128 % degree:  # the vocabulary is padded to a multiple of 128 whatever the layout
        yield Problem(
            "parallel.tensor",
            f"{degree} does not divide the vocabulary (padded to 128s)",
            f"the nearest that works: {_fits(extents, degree)}",
        )
    if parallel.sequence and degree == 1:
        yield Problem("parallel.sequence", "has no effect without tensor parallelism", "set parallel.sequence=false")


def _context(parallel: ParallelConfig, shapes: Shapes) -> Iterator[Problem]:
    degree, tensor = parallel.context, parallel.tensor
    cut = tensor if parallel.sequence else 1
    heads, length = shapes.num_heads // tensor, shapes.seq_length // cut
    works = [d for d in range(1, heads + 1) if heads % d == 0 and length % d == 0]
    mend = f"the nearest that works: {min(works, key=lambda d: abs(d - degree))}" if works else ""
    if heads % degree and shapes.num_heads % tensor == 0:
        whose = f"the {heads} heads of a tensor rank" if tensor > 1 else f"model.num_heads {heads}"
        yield Problem("parallel.context", f"{degree} does not divide {whose}", mend)
    if length % degree and shapes.seq_length % cut == 0:
        whose = f"a tensor rank's {length} of data.seq_length" if cut > 1 else f"data.seq_length {length}"
        yield Problem("parallel.context", f"{degree} does not divide {whose}", mend)


def _fits(extents: dict[str, int], wished: int) -> int:
    """The tensor degree nearest to the wished one that divides all."""
    works = [d for d in (1, 2, 4, 8, 16, 32, 64, 128) if all(extent % d == 0 for extent in extents.values())]
    return min(works, key=lambda d: abs(d - wished))


def _pipeline(parallel: ParallelConfig, shapes: Shapes) -> Iterator[Problem]:
    parts, layers = parallel.pipeline * parallel.virtual, shapes.num_layers
    if layers < parts:
        what = "" if parallel.virtual == 1 else f" x virtual {parallel.virtual}"
        mend = (
            f"at most {layers // parallel.virtual} stages" if layers >= parallel.virtual else "set parallel.virtual=1"
        )
        yield Problem(
            "parallel.pipeline", f"pipeline {parallel.pipeline}{what} is more than model.num_layers {layers}", mend
        )
    given = parallel.layers
    if given is not None and (len(given) != parts or sum(given) != layers or min(given) < 1):
        yield Problem(
            "parallel.layers",
            f"{given} does not share out model.num_layers {layers} over pipeline x virtual = {parts} parts",
            "give as many counts, each at least 1, that sum to the layers; or null",
        )
    if parallel.virtual > 1 and parallel.pipeline == 1:
        yield Problem("parallel.virtual", "has no effect without a pipeline", "set parallel.virtual=1")


def _batch(parallel: ParallelConfig, shapes: Shapes, world: int) -> Iterator[Problem]:
    model = parallel.tensor * parallel.context * parallel.pipeline
    if world % model:
        nearest = max(model, round(world / model) * model)
        yield Problem(
            "parallel",
            f"tensor x context x pipeline = {model} does not divide the {world} processes",
            f"start {nearest} processes",
        )
        return
    ranks = world // model
    for size in shapes.batch_sizes:
        yield from _one_batch(parallel, shapes.micro_size, ranks, size, ramp=size != shapes.batch_sizes[0])


def _one_batch(parallel: ParallelConfig, micro: int, ranks: int, size: int, ramp: bool) -> Iterator[Problem]:
    path = "batch.ramp" if ramp else "batch.size"
    if size % ranks:
        nearest = max(ranks, round(size / ranks) * ranks)
        yield Problem(
            path,
            f"{size} sequences cannot be shared by {ranks} data-parallel ranks",
            f"the nearest that works: {nearest}",
        )
        return
    share = size // ranks
    if share % micro:
        works = [d for d in range(1, share + 1) if share % d == 0]
        yield Problem(
            "batch.micro_size",
            f"{micro} does not divide a rank's {share} of {size} sequences a step",
            f"the nearest that works: {min(works, key=lambda d: abs(d - micro))}",
        )
    elif parallel.virtual > 1 and share // micro % parallel.pipeline:
        yield Problem(
            "batch.micro_size",
            f"the interleaved schedule needs a multiple of {parallel.pipeline} micro-batches, "
            f"{size} sequences give {share // micro}",
            f"set a micro_size that divides {share // parallel.pipeline}"
            if share % parallel.pipeline == 0
            else "set parallel.virtual=1",
        )
