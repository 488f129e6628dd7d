"""Multi-head attention of a block: within a sequence, and from a decoder to what an encoder made (Vaswani et al. 2017, 3.2).

Layers come from `parts`, so attention reads the same whether it holds whole weights or a tensor-parallel share of them.

Shapes: B batch, S sequence, M the encoder's sequence (s, m = this rank's slices of them between the parallel layers),
H hidden, N heads, G key/value heads, D head size. n and g are this rank's share of N and G.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.backends import Backend, Call
from parallel.adapters import LoRA
from parallel.layers import Parts
from pretrain.config.model import ModelConfig

SITES = 8  # dropout sites a layer; layer i's are 8 i + 1 ..., the embeddings' are among layer 0's
EMBEDDING_SITE, ATTENTION_SITE, ATTENTION_RESIDUAL_SITE, FEED_FORWARD_RESIDUAL_SITE = 0, 1, 2, 3
CROSS_SITE, CROSS_RESIDUAL_SITE, TARGET_EMBEDDING_SITE = 4, 5, 6
LORA_SITE = 1 << 20  # far from the others; layer i's products have 8 i ... behind it, one site each
QKV_PRODUCT, OUT_PRODUCT, UP_PRODUCT, DOWN_PRODUCT, CROSS_Q_PRODUCT, CROSS_KV_PRODUCT, CROSS_OUT_PRODUCT = range(7)


class Role(NamedTuple):
    """What a stack of layers is in its model: all of it, or the encoder or the decoder of two."""

    causal: bool
    first_layer: int = 0  # number of its first layer in the model, which keys the dropout masks
    memory_length: int | None = None  # M, of a decoder that attends to an encoder's states
    embedding_site: int = EMBEDDING_SITE


class Context(NamedTuple):
    """What every block of one forward pass shares."""

    sample_keys: Tensor | None = None  # (B,) int32: keys the dropout masks
    cos: Tensor | None = None  # (S, D/2) float32 rotary angles of the positions, or with `places` of all that there are
    sin: Tensor | None = None
    places: Tensor | None = None  # (B, S) int64: where each position stands in its document; None: in the sequence
    slopes: Tensor | None = None  # (n,) float32 ALiBi slopes of this rank's heads
    documents: Tensor | None = None  # (B, S of all context ranks) int32: who sees whom; None: all
    first: int = 0  # place of the first position: that many stand in the caches
    memory: Tensor | None = None  # (B, m, H) the encoder's states
    memory_documents: Tensor | None = None  # (B, M of all context ranks) int32, with `documents`, neither decreasing


class Cache:
    """The keys and values (B, length, g, D) of one layer, written as they come; of `like`'s type and device.

    memory: of a decoder's layer, the keys and values (B, M, g, D) of the encoder's states."""

    def __init__(
        self,
        batch: int,
        length: int,
        heads: int,
        head_size: int,
        like: Tensor,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.keys = like.new_zeros(batch, length, heads, head_size)
        self.values = like.new_zeros(batch, length, heads, head_size)
        self.memory = memory
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
        index = index.to(self.keys.device)
        self.keys, self.values = self._taken(self.keys, index), self._taken(self.values, index)
        if self.memory is not None:
            self.memory = self.memory[0][index], self.memory[1][index]

    def _taken(self, old: Tensor, index: Tensor) -> Tensor:
        new = old if len(index) == len(old) else old.new_zeros(len(index), *old.shape[1:])
        new[:, : self.filled] = old[index, : self.filled]  # the right side is a copy before anything is written
        return new


class _Heads(nn.Module):
    """What both kinds of attention share: this rank's heads, who computes them, and with what dropout."""

    def __init__(self, config: ModelConfig, parts: Parts, causal: bool, window: int | None, site: int) -> None:
        super().__init__()
        self.parts, self.causal, self.window, self.site = parts, causal, window, site
        self.heads, self.groups = parts.share(config.num_heads), parts.share(config.kv_heads)
        self.size, self.first_head = config.size_of_head, parts.first(config.num_heads)
        self.dropout = config.attention_dropout_rate
        self.recompute = False
        self.backends: dict[tuple[int, int], Backend] = {}  # by queries and keys of a whole sequence, the longest first

    def choose(self, length: int, total: int, biased: bool) -> None:
        """Decide who computes calls of `length` queries and `total` keys."""
        call = Call(
            self.heads,
            self.groups,
            self.size,
            length,
            total,
            causal=self.causal,
            window=None if self.window is None or self.window >= length else self.window,
            documents=self.parts.backends.documents,
            biased=biased,
            dropout=self.dropout > 0.0,
        )
        self.backends[length, total] = self.parts.attention_backend(call)

    def backend(self, q: Tensor, k: Tensor) -> Backend:
        """Who was chosen for sequences of which q (B, S, n, D) and k (B, T, g, D) are this context rank's slices; where
        nobody was, whoever computes the longest."""
        whole = q.shape[1] * self.parts.context.size, k.shape[1] * self.parts.context.size
        return self.backends.get(whole, next(iter(self.backends.values())))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cached: bool, **options: Any) -> Tensor:
        """(B, S, n D) of q (B, S, n, D), k and v (B, T, g, D)."""
        if self.recompute and torch.is_grad_enabled():
            whose = self.backend(q, k)
            z = checkpoint(self._core, q, k, v, whose, **options, use_reentrant=False, preserve_rng_state=False)
        else:
            # The backend was chosen for whole sequences; a position or two after a cache are another kind of call.
            z = self._core(q, k, v, "torch" if cached else self.backend(q, k), **options)
        return z.reshape(*q.shape[:2], self.heads * self.size)  # type: ignore[no-any-return]

    def _core(self, q: Tensor, k: Tensor, v: Tensor, backend: Backend, **options: Any) -> Tensor:
        return self.parts.attention(
            q,
            k,
            v,
            backend=backend,
            causal=self.causal,
            window=self.window,
            dropout=self.dropout if self.training else 0.0,
            site=self.site,
            first_head=self.first_head,
            **options,
        )


class Attention(_Heads):
    """Multi-head attention with grouped key/value heads; query, key and value are one product. length: of a sequence."""

    def __init__(self, config: ModelConfig, parts: Parts, layer: int, length: int, role: Role) -> None:
        site = SITES * (role.first_layer + layer) + ATTENTION_SITE
        super().__init__(config, parts, role.causal, config.window(layer), site)
        self.biased = config.positions == "alibi"
        self.prepare(length)
        queries, keys = config.num_heads * self.size, config.kv_heads * self.size
        outputs = {"q": queries, "k": keys, "v": keys}
        number = role.first_layer + layer
        lora = lora_of(config, tuple(outputs), number, QKV_PRODUCT)
        self.qkv = parts.column(config.hidden_size, outputs, config.biases, config.initial_scale, lora)
        lora = lora_of(config, ("out",), number, OUT_PRODUCT)
        self.out = parts.row(queries, config.hidden_size, config.biases, residual_scale(config), lora)

    def prepare(self, length: int) -> None:
        """Decide who computes sequences of `length`."""
        self.choose(length, length, self.biased)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        y = self.qkv(x, keys=context.sample_keys)
        sizes = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        q, k, v = (part.unflatten(2, (-1, self.size)) for part in y.split(sizes, dim=-1))  # (B, S, n or g, D)
        if context.cos is not None and context.sin is not None:
            q, k = self.parts.rotary(q, k, context.cos, context.sin, context.places)
        if cache is not None:
            k, v = cache.extend(context.first, k, v)
        z = self.attend(
            q,
            k,
            v,
            cached=cache is not None,
            slopes=context.slopes,
            documents=context.documents,
            keys=context.sample_keys,
            first_query=context.first,
        )
        return self.out(z, context.sample_keys)  # type: ignore[no-any-return]


class CrossAttention(_Heads):
    """Attention from a decoder's positions to all states of the encoder; key and value are one product. Neither has
    positions: what stands where is in the states. length, memory_length: of the two sequences."""

    def __init__(
        self, config: ModelConfig, parts: Parts, layer: int, length: int, memory_length: int, role: Role
    ) -> None:
        site = SITES * (role.first_layer + layer) + CROSS_SITE
        super().__init__(config, parts, causal=False, window=None, site=site)
        self.choose(length, memory_length, biased=False)
        queries, keys = config.num_heads * self.size, config.kv_heads * self.size
        number, hidden, scale = role.first_layer + layer, config.hidden_size, config.initial_scale
        lora = lora_of(config, ("q",), number, CROSS_Q_PRODUCT)
        self.q = parts.column(hidden, {"q": queries}, config.biases, scale, lora)
        lora = lora_of(config, ("k", "v"), number, CROSS_KV_PRODUCT)
        self.kv = parts.column(hidden, {"k": keys, "v": keys}, config.biases, scale, lora)
        lora = lora_of(config, ("out",), number, CROSS_OUT_PRODUCT)
        self.out = parts.row(queries, hidden, config.biases, residual_scale(config), lora)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        q = self.q(x, keys=context.sample_keys).unflatten(2, (-1, self.size))
        assert context.memory is not None or cache is not None, "a decoder takes the encoder's states"
        held = None if cache is None else cache.memory
        k, v = self.keys_values(context.memory, context.sample_keys) if held is None else held
        z = self.attend(
            q,
            k,
            v,
            cached=cache is not None,
            documents=context.memory_documents,
            query_documents=None if context.memory_documents is None else context.documents,
            keys=context.sample_keys,
        )
        return self.out(z, context.sample_keys)  # type: ignore[no-any-return]

    def keys_values(self, memory: Tensor | None, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, M, g, D) each, of the encoder's states (B, m, H). keys (B,): of the samples."""
        k, v = self.kv(memory, keys=keys).unflatten(2, (-1, self.size)).chunk(2, dim=2)
        return k, v


def lora_of(config: ModelConfig, names: tuple[str, ...], number: int, product: int) -> LoRA | None:
    """Of the number-th layer's product that holds these logical tensors, if any is a target."""
    lora = config.lora
    targets = () if lora is None else tuple(name for name in names if name in lora.targets)
    if lora is None or not targets:
        return None
    return LoRA(targets, lora.rank, lora.alpha / lora.rank, lora.dropout, LORA_SITE + SITES * number + product)


def residual_scale(config: ModelConfig) -> float:
    """Standard deviation of what a residual adds: initial_scale / sqrt(2 num_layers) (Radford et al. 2019, section 2.3)."""
    if not config.scale_initial_by_depth:
        return config.initial_scale
    return config.initial_scale / math.sqrt(2 * config.num_layers)
