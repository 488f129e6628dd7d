"""Cutting a model into pipeline stages, and the thin module that a schedule drives.

A stage is the part of the model that one pipeline rank holds; with `virtual` > 1 a rank holds several, dealt round-robin:
rank r of P holds chunks r, r + P, r + 2P, ... of the model (Narayanan et al. 2021, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """Which part of the model a stage holds."""

    layers: range
    first: bool  # embeds
    last: bool  # norm, head and loss


def cuts(num_layers: int, pipeline: int, virtual: int, rank: int) -> list[Cut]:
    """The parts of pipeline rank `rank`, in the order in which a sample meets them."""
    chunks = pipeline * virtual
    return [
        Cut(_share(num_layers, chunks, chunk), first=chunk == 0, last=chunk == chunks - 1)
        for chunk in range(rank, chunks, pipeline)
    ]


def _share(num_layers: int, chunks: int, chunk: int) -> range:
    return range(num_layers * chunk // chunks, num_layers * (chunk + 1) // chunks)


class Stage(nn.Module):
    """A part of the model as megatron-core's schedules call it; `config` is set by `parallel.schedules`.

    The model part takes `(*batch, hidden)` and returns hidden states (B, s, H), or the summed loss on the last stage.
    """

    config: Any = None
    model_type: Any = None

    def __init__(self, module: nn.Module, cut: Cut, compile: bool = False) -> None:
        super().__init__()
        self.module = module
        self.cut = cut
        self._received: Tensor | None = None
        self._run: Callable[..., Tensor] = torch.compile(module.forward, dynamic=False) if compile else module

    def set_input_tensor(self, tensor: Any) -> None:
        """megatron-core hands over what the previous stage sent."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, batch: tuple[Tensor, ...]) -> Tensor:
        output = self._run(*batch, hidden=None if self.cut.first else self._received)
        return output if self.cut.last else output.contiguous()


def parameter_paths(stages: Sequence[Stage]) -> dict[nn.Parameter, str]:
    """This rank's parameters and their paths in the whole model; a tied parameter once."""
    return {parameter: path for stage in stages for path, parameter in stage.module.named_parameters()}
