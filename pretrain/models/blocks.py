"""The Transformer's block (Vaswani et al. 2017, section 3): attention and a feed-forward layer, each with a residual.

Layers come from `parts`, so a block reads the same whether it holds whole weights or a tensor-parallel share of them.

Shapes: B batch, S sequence (s = this rank's slice of it between the parallel layers), H hidden, N heads, G key/value heads,
D head size, F feed-forward size. n and g are this rank's share of N and G.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.activation import GATED
from kernels.attention import alibi_slopes
from kernels.backends import Backend, Call
from kernels.noise import dropout
from parallel.layers import Parts
from pretrain.config.model import ModelConfig

Recompute = Literal["none", "selective", "full"]
SITES = 8  # dropout sites a layer; layer i's are 8 i + 1 ..., the embedding's is EMBEDDING_SITE
EMBEDDING_SITE, ATTENTION_SITE, ATTENTION_RESIDUAL_SITE, FEED_FORWARD_RESIDUAL_SITE = 0, 1, 2, 3


class Context(NamedTuple):
    """What every block of one forward pass shares."""

    sample_keys: Tensor | None = None  # (B,) int32: keys the dropout masks
    cos: Tensor | None = None  # (S, D/2) float32 rotary angles of the positions, or with `places` of all that there are
    sin: Tensor | None = None
    places: Tensor | None = None  # (B, S) int64: where each position stands in its document; None: in the sequence
    slopes: Tensor | None = None  # (n,) float32 ALiBi slopes of this rank's heads
    documents: Tensor | None = None  # (B, S of all context ranks) int32: who sees whom; None: all
    first: int = 0  # place of the first position: that many stand in the caches


class Cache:
    """The keys and values (B, length, g, D) of one layer, written as they come; of `like`'s type and device."""

    def __init__(self, batch: int, length: int, heads: int, head_size: int, like: Tensor) -> None:
        self.keys = like.new_zeros(batch, length, heads, head_size)
        self.values = like.new_zeros(batch, length, heads, head_size)
        self.filled = 0  # positions

    def extend(self, first: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, S, g, D) at places first : first + S; returns all up to there, (B, first + S, g, D)."""
        last = first + k.shape[1]
        if last > self.keys.shape[1]:
            raise ValueError(f"the cache holds {self.keys.shape[1]} positions, {last} are needed")
        self.keys[:, first:last] = k
        self.values[:, first:last] = v
        self.filled = last
        return self.keys[:, :last], self.values[:, :last]

    def reorder(self, index: Tensor) -> None:
        """Sequence i becomes a copy of what index[i] was; index (B',) int64 may leave some out and take some twice."""
        self.keys, self.values = (self._taken(old, index.to(old.device)) for old in (self.keys, self.values))

    def _taken(self, old: Tensor, index: Tensor) -> Tensor:
        new = old if len(index) == len(old) else old.new_zeros(len(index), *old.shape[1:])
        new[:, : self.filled] = old[index, : self.filled]  # the right side is a copy before anything is written
        return new


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads; query, key and value are one product. length: of a sequence."""

    def __init__(self, config: ModelConfig, parts: Parts, layer: int, length: int) -> None:
        super().__init__()
        heads, groups, size = config.num_heads, config.kv_heads, config.size_of_head
        outputs = {"q": heads * size, "k": groups * size, "v": groups * size}
        self.parts = parts
        self.heads, self.groups, self.size = parts.share(heads), parts.share(groups), size
        self.first_head = parts.first(heads)
        self.causal, self.window = config.causal, config.window(layer)
        self.dropout = config.attention_dropout_rate
        self.site = SITES * layer + ATTENTION_SITE
        self.recompute = False
        self.backend = parts.attention_backend(self._call(config, length))
        self.qkv = parts.column(config.hidden_size, outputs, config.biases, config.initial_scale)
        self.out = parts.row(heads * size, config.hidden_size, config.biases, residual_scale(config))

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        y = self.qkv(x)
        batch, length, _ = y.shape
        sizes = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        q, k, v = (part.view(batch, length, -1, self.size) for part in y.split(sizes, dim=-1))  # (B, S, n or g, D)
        if context.cos is not None and context.sin is not None:
            q, k = self.parts.rotary(q, k, context.cos, context.sin, context.places)
        if cache is not None:
            k, v = cache.extend(context.first, k, v)
        if self.recompute and torch.is_grad_enabled():
            z = checkpoint(self._core, q, k, v, context, self.backend, use_reentrant=False, preserve_rng_state=False)
        else:
            # The backend was chosen for whole sequences; a position or two after a cache are another kind of call.
            z = self._core(q, k, v, context, self.backend if cache is None else "torch")
        return self.out(z.reshape(batch, length, self.heads * self.size))

    def _call(self, config: ModelConfig, length: int) -> Call:
        return Call(
            self.heads,
            self.groups,
            self.size,
            length,
            length,
            causal=self.causal,
            window=None if self.window is None or self.window >= length else self.window,
            documents=self.parts.backends.documents,
            biased=config.positions == "alibi",
            dropout=self.dropout > 0.0,
        )

    def _core(self, q: Tensor, k: Tensor, v: Tensor, context: Context, backend: Backend) -> Tensor:
        return self.parts.attention(
            q,
            k,
            v,
            backend=backend,
            causal=self.causal,
            window=self.window,
            slopes=context.slopes,
            documents=context.documents,
            dropout=self.dropout if self.training else 0.0,
            keys=context.sample_keys,
            site=self.site,
            first_head=self.first_head,
            first_query=context.first,
        )


class FeedForward(nn.Module):
    """down(activation(up(x))); a gated activation has its gate and up in one product."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        size = config.feed_forward_size
        outputs = {"gate": size, "up": size} if config.activation in GATED else {"up": size}
        self.activation = parts.activation(config.activation)
        self.up = parts.column(config.hidden_size, outputs, config.biases, config.initial_scale)
        self.down = parts.row(size, config.hidden_size, config.biases, residual_scale(config))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x, self.activation))


class Block(nn.Module):
    """Pre-norm: x + f(norm(x)), as in GPT-2. Post-norm: norm(x + f(x)), as in the 2017 paper. Each f has its dropout."""

    def __init__(self, config: ModelConfig, parts: Parts, layer: int, length: int) -> None:
        super().__init__()
        self.parts, self.layer = parts, layer
        self.pre = config.norm_position == "pre"
        self.dropout = config.residual_dropout_rate
        self.norm_1 = parts.norm(config.norm, config.hidden_size, config.norm_epsilon, config.biases)
        self.attention = Attention(config, parts, layer, length)
        self.norm_2 = parts.norm(config.norm, config.hidden_size, config.norm_epsilon, config.biases)
        self.feed_forward = FeedForward(config, parts)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        if self.pre:
            attended = self.attention(self.norm_1(x), context, cache)
            y, x = self._add(self.norm_2, attended, x, context, ATTENTION_RESIDUAL_SITE)
            return x + self._drop(self.feed_forward(y), context, FEED_FORWARD_RESIDUAL_SITE)
        x, _ = self._add(self.norm_1, self.attention(x, context, cache), x, context, ATTENTION_RESIDUAL_SITE)
        return self._add(self.norm_2, self.feed_forward(x), x, context, FEED_FORWARD_RESIDUAL_SITE)[0]

    def _add(self, norm: nn.Module, x: Tensor, residual: Tensor, context: Context, site: int) -> tuple[Tensor, Tensor]:
        """The norm of residual + dropout(x), and that sum: one pass where Triton computes norms."""
        rate, number = self.dropout if self.training else 0.0, SITES * self.layer + site
        first_row = self.parts.first_row(x.shape[1])
        return norm(x, residual, rate, context.sample_keys, number, first_row)  # type: ignore[no-any-return]

    def _drop(self, x: Tensor, context: Context, site: int) -> Tensor:
        return drop(
            x, self.dropout if self.training else 0.0, context.sample_keys, SITES * self.layer + site, self.parts
        )


def drop(x: Tensor, rate: float, keys: Tensor | None, site: int, parts: Parts) -> Tensor:
    """Dropout of activations (B, s, H) in the coordinates of the whole sequence."""
    if rate == 0.0:
        return x
    if keys is None:
        raise ValueError("dropout needs the sample keys of the batch: pass sample_keys, or call eval()")
    return dropout(x, rate, keys, site, parts.first_row(x.shape[1]))


def residual_scale(config: ModelConfig) -> float:
    """Standard deviation of what a residual adds: initial_scale / sqrt(2 num_layers) (Radford et al. 2019, section 2.3)."""
    if not config.scale_initial_by_depth:
        return config.initial_scale
    return config.initial_scale / math.sqrt(2 * config.num_layers)


def local_slopes(num_heads: int, parts: Parts) -> Tensor:
    """ALiBi slopes (n,) of this rank's heads."""
    first = parts.first(num_heads)
    return alibi_slopes(num_heads)[first : first + parts.share(num_heads)].clone()


def sinusoids(length: int, hidden_size: int) -> Tensor:
    """(length, H) float32: sin on even features, cos on odd, wavelengths 2 pi to 20,000 pi (Vaswani et al. 2017, 3.5)."""
    places = torch.arange(length, dtype=torch.float32)[:, None]
    angles = places * 10000.0 ** (-torch.arange(0, hidden_size, 2, dtype=torch.float32) / hidden_size)[None, :]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(length, -1)[:, :hidden_size]


class Table(nn.Module):
    """A float32 table that follows the module's device but not its type: positions in bf16 would lose their place."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)
        self.values: Tensor

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.values = self.values.to(fn(self.values).device)
        return self
