"""A checkpoint's weights as a model without LoRA has them: the factors are merged into what they stand beside, W + s B A.

Boxes of W are made of boxes of the factors, in float64, so that the rounded sum is the same whatever box it is asked for in.
"""

from __future__ import annotations

from torch import Tensor

from parallel.adapters import FACTORS
from pretrain.checkpoint import Checkpoint, read_box, weight_shapes
from pretrain.config.model import ModelConfig


class Merged:
    """model: of the run that wrote the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig) -> None:
        self.checkpoint, self.folder = checkpoint, checkpoint.folder
        self._lora, self._stored = model.lora, weight_shapes(checkpoint)
        self.shapes = {name: shape for name, shape in self._stored.items() if not name.endswith(FACTORS)}

    def read(self, name: str) -> Tensor:
        """One logical tensor, whole, float32. Raises UserError."""
        shape = self.shapes[name]
        return self.read_box(name, (0,) * len(shape), shape)

    def read_box(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """float32 box of one logical tensor. Raises UserError."""
        values = read_box(self.checkpoint, name, offset, size)
        first, second = (name.removesuffix(".weight") + factor for factor in FACTORS)
        if self._lora is None or not name.endswith(".weight") or first not in self._stored:
            return values
        rank, scale = self._lora.rank, self._lora.alpha / self._lora.rank
        a = read_box(self.checkpoint, first, (0, offset[1]), (rank, size[1])).double()
        b = read_box(self.checkpoint, second, (offset[0], 0), (size[0], rank)).double()
        return (values.double() + scale * (b @ a)).float()
