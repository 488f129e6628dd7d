"""Mixout (Lee, Cho and Kang 2020, equation 5): in a training step each weight is, with probability p, the one that it began
with, so that a tuned model does not go far from where it came from.

    w' = ((1 - M) u + M w - p u) / (1 - p)        M is 1 with probability 1 - p; u: the weight in the beginning

whose mean over the masks is w. The model computes with w', and the gradient of w is that of w' times M / (1 - p).

What an engine's model computes with are copies of its masters (`AdamWOptions.apart`), which each of its steps makes anew: so
w' is written over them when a step begins, and nothing is ever to be put back. Masks are functions of (seed, step, name,
place in the logical tensor), the same for all micro-batches of a step and under every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kernels import noise
from parallel.logical import Piece, canonical, view


class Mixout:
    """Of parameters (two dimensions each) by their paths; values(path, parameter): float32 of what they began with."""

    def __init__(
        self,
        parameters: Mapping[nn.Parameter, str],
        values: Callable[[str, nn.Parameter], Tensor],
        rate: float,
        seed: int,
    ) -> None:
        self.rate, self.seed, self.paths = rate, seed, dict(parameters)
        self.begun = {parameter: values(path, parameter).to(parameter) for parameter, path in parameters.items()}
        self.kept: dict[nn.Parameter, Tensor] = {}  # M, bool
        for parameter in parameters:
            parameter.register_hook(lambda gradient, parameter=parameter: self._of_master(gradient, parameter))

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Mix the weights for the forward and backward passes of a step."""
        for parameter, path in self.paths.items():
            begun, kept = self.begun[parameter], torch.ones_like(parameter, dtype=torch.bool)
            for piece in parameter.pieces:  # type: ignore[attr-defined]
                view(kept, piece).copy_(self._mask(step, canonical(path, piece), piece, parameter.device))
            mixed = (parameter - self.rate * begun) / (1.0 - self.rate)
            parameter.copy_(torch.where(kept, mixed, begun))
            self.kept[parameter] = kept

    def _mask(self, step: int, name: str, piece: Piece, device: torch.device) -> Tensor:
        key = torch.tensor([noise.key(self.seed, "mixout", step, name)], dtype=torch.int32, device=device)
        rows, columns = (
            torch.arange(first, first + count, device=device)
            for first, count in zip(piece.offset, piece.size, strict=True)
        )
        return noise.keep_mask(key, 0, rows, columns, self.rate)[0]

    def _of_master(self, gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        return gradient * self.kept[parameter] / (1.0 - self.rate)
