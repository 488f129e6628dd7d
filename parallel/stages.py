"""Cutting a model into pipeline stages, and the thin module that a schedule drives.

A stage is the part of the model that one pipeline rank holds; with `virtual` > 1 a rank holds several, dealt round-robin:
rank r of P holds chunks r, r + P, r + 2P, ... of the model (Narayanan et al. 2021, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """Which part of the model a stage holds."""

    layers: range
    first: bool  # embeds
    last: bool  # norm, head and loss


def layers_of_parts(num_layers: int, parts: int, head: float) -> list[int]:
    """Layers of each part of the model, so that the slowest part is as fast as can be; the last also computes the head,
    which costs as much as `head` layers (the embedding, a look-up, costs nothing). At least one each, later ones first
    where that is the same: an early stage holds the most activations (Narayanan et al. 2021, section 2.2)."""
    counts = [1] * parts
    extra = [0.0] * (parts - 1) + [head if parts > 1 else 0.0]
    for _ in range(num_layers - parts):
        loads = [count + more for count, more in zip(counts, extra, strict=True)]
        counts[min(range(parts), key=lambda part: (loads[part], -part))] += 1
    return counts


def cuts(layers: Sequence[int], pipeline: int, rank: int) -> list[Cut]:
    """The parts of pipeline rank `rank`, in the order in which a sample meets them; layers: of each part of the model."""
    first = [sum(layers[:part]) for part in range(len(layers) + 1)]
    return [
        Cut(range(first[part], first[part + 1]), first=part == 0, last=part == len(layers) - 1)
        for part in range(rank, len(layers), pipeline)
    ]


class Stage(nn.Module):
    """A part of the model as megatron-core's schedules call it; `config` is set by `parallel.schedules`.

    The model part takes `(*batch, hidden)` and returns hidden states (B, s, H), or the summed loss on the last stage.
    """

    config: Any = None
    model_type: Any = None
    decoder: Any = SimpleNamespace(
        layers=()
    )  # its schedules number the layers of one; a model's own has none of theirs

    def __init__(self, module: nn.Module, cut: Cut, compile: bool = False) -> None:
        super().__init__()
        self.module = module
        self.cut = cut
        self._received: Tensor | None = None
        self._run: Callable[..., Tensor] = torch.compile(module.forward, dynamic=False) if compile else module

    def set_input_tensor(self, tensor: Any) -> None:
        """megatron-core hands over what the previous stage sent."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, batch: tuple[Tensor | None, ...]) -> Tensor:
        output = self._run(*batch, hidden=None if self.cut.first else self._received)
        return output if self.cut.last else output.contiguous()


def parameter_paths(stages: Sequence[Stage]) -> dict[nn.Parameter, str]:
    """This rank's parameters and their paths in the whole model; a tied parameter once."""
    return {parameter: path for stage in stages for path, parameter in stage.module.named_parameters()}
