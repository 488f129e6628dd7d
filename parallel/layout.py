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
    timeout: float = Field(
        600.0,
        gt=0,
        description="seconds after which a rank gives up that waits for the others, or, 0.9 of them, for its data",
    )
    bandwidth_floor: float | None = Field(
        None,
        gt=0,
        description="MB/s that an all-reduce of each group must reach as a run starts, else the slow host is named; null: any",
    )


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
        """A layout of one string: `tp=2,sp,cp=2,pp=2,vp=2,dp=2,zero=2,offload`; what is not named is 1, zero is 0. What a layout
        prints as is read too. ValueError names the part that cannot be read."""
        degrees: dict[str, Any] = {}
        parts = [part.strip() for part in re.split(r",| x ", text)]
        for part in (part for part in parts if part not in ("", "1 process")):
            name, value = _parse_degree(text, part)
            if name in degrees:
                raise ValueError(f"layout {text!r}: {part!r} comes after another of its kind; give each once")
            degrees[name] = value
        return cls(**degrees)

    def __str__(self) -> str:
        degrees = {"tp": self.tensor, "cp": self.context, "pp": self.pipeline, "vp": self.virtual, "dp": self.data}
        parts = [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]
        if self.sequence:
            parts.insert(1, "sp")
        return f"{' x '.join(parts) or '1 process'}, zero {self.zero}{', offload' if self.offload else ''}"


AXES = {"tp": "tensor", "cp": "context", "pp": "pipeline", "vp": "virtual", "dp": "data", "zero": "zero"}


def _parse_degree(text: str, part: str) -> tuple[str, int | bool]:
    if part in ("sp", "offload"):
        return {"sp": "sequence"}.get(part, part), True
    match = re.fullmatch(r"([a-z]+)[= ]?(\d+)", part)
    if match is None or match[1] not in AXES:
        raise ValueError(
            f"layout {text!r}: {part!r} is none of {', '.join(f'{name}=N' for name in AXES)}, sp or offload"
        )
    axis, degree = AXES[match[1]], int(match[2])
    if axis == "zero" and degree > 3:
        raise ValueError(f"layout {text!r}: {part!r}, but ZeRO has the stages 0 to 3")
    if axis != "zero" and degree < 1:
        raise ValueError(f"layout {text!r}: {part!r}, but a degree is at least 1")
    return axis, degree


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
    lengths: tuple[tuple[str, int], ...]  # of the sequences that a sample is, each with its name
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
        extents |= dict(shapes.lengths)
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
    # What does not divide over the tensor ranks is told there; here nothing follows from it.
    heads = 0 if shapes.num_heads % tensor else shapes.num_heads // tensor
    lengths = {name: 0 if length % cut else length // cut for name, length in shapes.lengths}
    works = [d for d in range(1, 2 * degree) if not any(extent % d for extent in (heads, *lengths.values()))]
    mend = f"the nearest that works: {_nearest(works, degree)}"
    if heads % degree:
        whose = f"the {heads} heads of a tensor rank" if tensor > 1 else f"model.num_heads {heads}"
        yield Problem("parallel.context", f"{degree} does not divide {whose}", mend)
    for name, length in lengths.items():
        if length % degree:
            whose = f"a tensor rank's {length} of {name}" if cut > 1 else f"{name} {length}"
            yield Problem("parallel.context", f"{degree} does not divide {whose}", mend)


def _fits(extents: dict[str, int], wished: int) -> int:
    """The tensor degree nearest to the wished one that divides all."""
    works = [d for d in (1, 2, 4, 8, 16, 32, 64, 128) if all(extent % d == 0 for extent in extents.values())]
    return _nearest(works, wished)


def _pipeline(parallel: ParallelConfig, shapes: Shapes) -> Iterator[Problem]:
    stages, parts, layers = parallel.pipeline, parallel.virtual, shapes.num_layers
    if parts > 1 and stages == 1:
        yield Problem("parallel.virtual", "has no effect without a pipeline", "set parallel.virtual=1")
    elif layers < stages * parts:
        path, what = ("parallel.virtual", f" x virtual {parts}") if parts > 1 else ("parallel.pipeline", "")
        most = layers // parts  # stages
        mend = f"the nearest that works: pipeline {most}" if most > 1 or parts == 1 else "set parallel.virtual=1"
        yield Problem(path, f"pipeline {stages}{what} is more than model.num_layers {layers}", mend)
    given = parallel.layers
    if given is not None and (len(given) != stages * parts or sum(given) != layers or min(given) < 1):
        yield Problem(
            "parallel.layers",
            f"{given} does not share out model.num_layers {layers} over pipeline x virtual = {stages * parts} parts",
            "give as many counts, each at least 1, that sum to the layers; or null",
        )


def _nearest(works: list[int], wished: int) -> int:
    return min(works, key=lambda degree: abs(degree - wished))


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
    ranks, micro = world // model, shapes.micro_size
    size, *ramp = shapes.batch_sizes
    # The interleaved schedule goes round the stages with as many micro-batches at a time.
    group = parallel.pipeline if parallel.virtual > 1 else 1
    yield from _full_batch(size, ranks, micro, group)
    unit = ranks * micro * group
    uneven = [size for size in ramp if size % unit]
    if uneven:
        what = f"{ranks} data-parallel ranks x micro_size {micro}" + (f" x pipeline {group}" if group > 1 else "")
        yield Problem(
            "batch.ramp",
            f"{uneven[0]} sequences, one of its sizes, are no multiple of {what} = {unit}",
            f"make start and increment multiples of {unit}",
        )


def _full_batch(size: int, ranks: int, micro: int, group: int) -> Iterator[Problem]:
    """group: a rank's number of micro-batches must be a multiple of it."""
    if size % (ranks * group):
        nearest = max(1, round(size / (ranks * group))) * ranks * group
        fits = _nearest(_divisors(nearest // ranks // group), micro)
        message = f"{size} sequences cannot be shared by {ranks} data-parallel ranks"
        if size % ranks == 0:
            message = (
                f"a rank's {size // ranks} sequences give no multiple of {group} micro-batches (interleaved schedule)"
            )
        others = f" with batch.micro_size {fits}" if fits != micro else ""
        yield Problem("batch.size", message, f"the nearest that works: {nearest}{others}")
    elif size // ranks // group % micro:
        share = size // ranks
        message = f"{micro} does not divide a rank's {share} of {size} sequences a step"
        if share % micro == 0:
            message = f"{share // micro} micro-batches, but the interleaved schedule needs a multiple of {group}"
        fits = _nearest(_divisors(share // group), micro)
        yield Problem("batch.micro_size", message, f"the nearest that works: {fits}")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
