"""The Transformer's block (Vaswani et al. 2017, section 3): attention, in a decoder of two stacks also to the encoder, and
a feed-forward layer, each with a residual.

Layers come from `parts`, so a block reads the same whether it holds whole weights or a tensor-parallel share of them.

Shapes: B batch, S sequence (s = this rank's slice of it between the parallel layers), H hidden, N heads, G key/value heads,
D head size, F feed-forward size. n and g are this rank's share of N and G.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kernels.activation import GATED
from kernels.attention import alibi_slopes
from kernels.noise import dropout
from parallel.layers import Parts
from pretrain.config.model import ModelConfig
from pretrain.models.attention import (
    ATTENTION_RESIDUAL_SITE,
    CROSS_RESIDUAL_SITE,
    DOWN_PRODUCT,
    FEED_FORWARD_RESIDUAL_SITE,
    SITES,
    UP_PRODUCT,
    Attention,
    Cache,
    Context,
    CrossAttention,
    Role,
    lora_of,
    residual_scale,
)

Recompute = Literal["none", "selective", "full"]


class FeedForward(nn.Module):
    """down(activation(up(x))); a gated activation has its gate and up in one product. number: of the layer in the model."""

    def __init__(self, config: ModelConfig, parts: Parts, number: int) -> None:
        super().__init__()
        size = config.feed_forward_size
        outputs = {"gate": size, "up": size} if config.activation in GATED else {"up": size}
        self.activation = parts.activation(config.activation)
        lora = lora_of(config, tuple(outputs), number, UP_PRODUCT)
        self.up = parts.column(config.hidden_size, outputs, config.biases, config.initial_scale, lora)
        lora = lora_of(config, ("down",), number, DOWN_PRODUCT)
        self.down = parts.row(size, config.hidden_size, config.biases, residual_scale(config), lora)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.down(self.up(x, self.activation, keys), keys)


class Block(nn.Module):
    """Pre-norm: x + f(norm(x)), as in GPT-2. Post-norm: norm(x + f(x)), as in the 2017 paper. Each f has its dropout."""

    def __init__(self, config: ModelConfig, parts: Parts, layer: int, length: int, role: Role) -> None:
        super().__init__()
        self.parts, self.number = parts, role.first_layer + layer
        self.pre = config.norm_position == "pre"
        self.dropout = config.residual_dropout_rate
        self.norm_1 = self._norm(config)
        self.attention = Attention(config, parts, layer, length, role)
        self.cross: CrossAttention | None = None
        if role.memory_length is not None:
            self.cross_norm = self._norm(config)
            self.cross = CrossAttention(config, parts, layer, length, role.memory_length, role)
        self.norm_2 = self._norm(config)
        self.feed_forward = FeedForward(config, parts, self.number)

    def _norm(self, config: ModelConfig) -> nn.Module:
        return self.parts.norm(config.norm, config.hidden_size, config.norm_epsilon, config.biases)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        return self._pre(x, context, cache) if self.pre else self._post(x, context, cache)

    def _pre(self, x: Tensor, context: Context, cache: Cache | None) -> Tensor:
        y, site = self.attention(self.norm_1(x), context, cache), ATTENTION_RESIDUAL_SITE
        if self.cross is not None:
            y, x = self._add(self.cross_norm, y, x, context, site)
            y, site = self.cross(y, context, cache), CROSS_RESIDUAL_SITE
        y, x = self._add(self.norm_2, y, x, context, site)
        return x + self._drop(self.feed_forward(y, context.sample_keys), context, FEED_FORWARD_RESIDUAL_SITE)

    def _post(self, x: Tensor, context: Context, cache: Cache | None) -> Tensor:
        x, _ = self._add(self.norm_1, self.attention(x, context, cache), x, context, ATTENTION_RESIDUAL_SITE)
        if self.cross is not None:
            x, _ = self._add(self.cross_norm, self.cross(x, context, cache), x, context, CROSS_RESIDUAL_SITE)
        fed = self.feed_forward(x, context.sample_keys)
        return self._add(self.norm_2, fed, x, context, FEED_FORWARD_RESIDUAL_SITE)[0]

    def _add(self, norm: nn.Module, x: Tensor, residual: Tensor, context: Context, site: int) -> tuple[Tensor, Tensor]:
        """The norm of residual + dropout(x), and that sum: one pass where Triton computes norms."""
        rate, number = self.dropout if self.training else 0.0, SITES * self.number + site
        first_row = self.parts.first_row(x.shape[1])
        return norm(x, residual, rate, context.sample_keys, number, first_row)  # type: ignore[no-any-return]

    def _drop(self, x: Tensor, context: Context, site: int) -> Tensor:
        rate = self.dropout if self.training else 0.0
        return drop(x, rate, context.sample_keys, SITES * self.number + site, self.parts)


def drop(x: Tensor, rate: float, keys: Tensor | None, site: int, parts: Parts) -> Tensor:
    """Dropout of activations (B, s, H) in the coordinates of the whole sequence."""
    if rate == 0.0:
        return x
    if keys is None:
        raise ValueError("dropout needs the sample keys of the batch: pass sample_keys, or call eval()")
    return dropout(x, rate, keys, site, parts.first_row(x.shape[1]))


def local_slopes(num_heads: int, parts: Parts) -> Tensor:
    """ALiBi slopes (n,) of this rank's heads."""
    first = parts.first(num_heads)
    return alibi_slopes(num_heads)[first : first + parts.share(num_heads)].clone()


def sinusoids(length: int, hidden_size: int) -> Tensor:
    """(length, H) float32: sin on even features, cos on odd, wavelengths 2 pi to 20,000 pi (Vaswani et al. 2017, 3.5)."""
    # In float64: a float32 angle of 4,000 radians is off by 2e-4.
    places = torch.arange(length, dtype=torch.float64)[:, None]
    angles = places * 10000.0 ** (-torch.arange(0, hidden_size, 2, dtype=torch.float64) / hidden_size)[None, :]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(length, -1)[:, :hidden_size].float()


class Table(nn.Module):
    """A float32 table that follows the module's device but not its type: positions in bf16 would lose their place."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)
        self.values: Tensor

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.values = self.values.to(fn(self.values).device)
        return self
