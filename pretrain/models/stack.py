"""What every model here is, up to its head: ids -> embedding (+ positions, segments) -> norm -> dropout -> blocks -> norm.

Whole, or the layers of one pipeline stage. A model (`gpt.py`, `bert.py`) is a stack with a head of its own, and says in its
`forward` what the head makes of the hidden states; an encoder-decoder (`transformer.py`) is two without an embedding, which
they share. Weights' type is the type of the residual stream; norms, softmax and the loss are float32 inside.

Shapes: B batch, S sequence, s this rank's slice of it (= S without sequence parallelism), H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.embedding import embedding
from kernels.rotary import rotary_angles
from parallel.layers import Parts
from pretrain.config.model import ModelConfig
from pretrain.models.attention import Context, Role
from pretrain.models.blocks import Block, Recompute, Table, drop, local_slopes, sinusoids


class Stack(nn.Module):
    """Holds `layers` (global numbers), the embeddings if `first`, the final norm if `last`.

    A tied stage that is last but not first holds its own copy of the embedding under the same name, `tied_copy`, if its
    head gives a vocabulary. vocab_size None: it has no embedding. role: what it is in its model, the whole unless given.
    """

    gives_vocabulary = True

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        vocab_size: int | None,
        seq_length: int,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        recompute: Recompute = "none",
        role: Role | None = None,
    ) -> None:
        super().__init__()
        self.config, self.parts, self.role = config, parts, role or Role(config.causal)
        self.is_first, self.is_last = first, last
        self.max_length = max(seq_length, config.max_positions or 0)
        hidden, scale = config.hidden_size, config.initial_scale
        self.tied = config.tie_embeddings and self.gives_vocabulary
        if vocab_size is not None and (first or (last and self.tied)):
            self.embedding = parts.embedding(vocab_size, hidden, scale)
        if first and config.positions == "learned":
            self.positions = parts.table(self.max_length, hidden, scale)
        if first and config.positions == "sinusoidal":
            self.waves = Table(sinusoids(self.max_length, hidden))
        if first and config.num_segments:
            self.segments = parts.table(config.num_segments, hidden, scale)
        if first and config.has_embedding_norm:
            self.embedding_norm = parts.norm(config.norm, hidden, config.norm_epsilon, config.biases)
        if config.positions == "rope":
            places = torch.arange(self.max_length)
            scaling = config.rope_scaling.model_dump() if config.rope_scaling else None
            cos, sin = rotary_angles(places, config.size_of_head, config.rope_base, scaling)
            self.angles = Table(torch.stack((cos, sin)))  # (2, S, D/2)
        if config.positions == "alibi":
            self.slopes = Table(local_slopes(config.num_heads, parts))
        numbers = range(config.num_layers) if layers is None else layers
        self.blocks = nn.ModuleDict({str(i): Block(config, parts, i, seq_length, self.role) for i in numbers})
        if last and config.norm_position == "pre":
            self.norm = parts.norm(config.norm, hidden, config.norm_epsilon, config.biases)
        self.recompute = recompute

    @property
    def recompute(self) -> Recompute:
        """What the backward pass makes again: nothing, each layer's attention ("selective"), or each layer ("full")."""
        return self._recompute

    @recompute.setter
    def recompute(self, value: Recompute) -> None:
        if value not in ("none", "selective", "full"):
            raise ValueError(f"recompute is none, selective or full, found {value!r}")
        self._recompute: Recompute = value
        for _, block in self.layers():
            for attention in (block.attention, block.cross):
                if attention is not None:
                    attention.recompute = value == "selective"

    def layers(self) -> Iterator[tuple[str, Block]]:
        """This stage's blocks and their names, in order."""
        for name, block in self.blocks.items():
            assert isinstance(block, Block)
            yield name, block

    def prepare(self, length: int) -> None:
        """Decide who computes the attention of sequences of `length` too, which are shorter than the longest."""
        for _, block in self.layers():
            block.attention.prepare(length)

    @property
    def tied_copy(self) -> nn.Parameter | None:
        """This stage's copy of the first stage's embedding, whose gradient the two must sum."""
        copied = self.is_last and not self.is_first and self.tied
        return self.embedding.weight if copied else None

    def states(
        self,
        inputs: Tensor | None,
        length: int,
        sample_keys: Tensor | None = None,
        documents: Tensor | None = None,
        segments: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, s, H) after this stage's layers, on the last stage after the final norm.

        inputs (B, S) ids and segments (B, S), this context rank's slices of `length` positions; sample_keys (B,);
        documents (B, S of all context ranks) numbers of the documents if each is to be seen alone; hidden (B, s, H) from
        the stage before.
        """
        if self.is_first:
            assert inputs is not None, "the first stage takes `inputs`"
            hidden = self.begin(self.embedding(inputs), sample_keys, documents, segments)
        assert hidden is not None, "a stage that is not the first takes `hidden`"
        return self.run(hidden, self.context(length, sample_keys, documents))

    def begin(
        self,
        x: Tensor,
        sample_keys: Tensor | None,
        documents: Tensor | None = None,
        segments: Tensor | None = None,
        first: int | None = None,
    ) -> Tensor:
        """What the blocks take, (B, s, H), of the ids' embeddings (B, s, H). first: place of the first position, that of
        this context rank's slice unless given."""
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.hidden_size)
        if self.config.positions in ("learned", "sinusoidal"):
            x = x + self._rows(x.shape[1], documents, first).to(x.dtype)
        if self.config.num_segments:
            whole = x.new_zeros(x.shape[:2], dtype=torch.int64) if segments is None else self.parts.scatter(segments)
            x = x + embedding(whole, self.segments).to(x.dtype)
        if self.config.has_embedding_norm:
            x = self.embedding_norm(x)
        rate = self.config.embedding_dropout_rate if self.training else 0.0
        return drop(x, rate, sample_keys, self.role.embedding_site, self.parts)

    def run(self, x: Tensor, context: Context) -> Tensor:
        """This stage's layers, on the last stage and the final norm: (B, s, H) of x (B, s, H)."""
        for block in self.blocks.values():
            if self._recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, context)
        return self.final(x) if self.is_last else x

    def final(self, x: Tensor) -> Tensor:
        """The norm after the last block, if there is one."""
        return self.norm(x) if self.config.norm_position == "pre" else x

    def _rows(self, rows: int, documents: Tensor | None, first: int | None) -> Tensor:
        """Of the table of positions, for `rows` activations of this rank."""
        table = self.positions if self.config.positions == "learned" else self.waves.values
        if documents is not None:
            return self.parts.scatter(embedding(self._places(documents), table))
        length = rows * (self.parts.axis.size if self.parts.axis.sequence else 1)
        begin = self.parts.first_place(length) if first is None else first
        return self.parts.scatter(table[None, begin : self._end(begin, length)])

    def _places(self, documents: Tensor) -> Tensor:
        """(B, S) places of this context rank's positions, each in its document."""
        places = torch.arange(documents.shape[1], device=documents.device)
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        return self.parts.own(places - torch.where(begins, places, 0).cummax(dim=1).values)

    def context(
        self, length: int, sample_keys: Tensor | None, documents: Tensor | None, first: int | None = None
    ) -> Context:
        """What the blocks share. length: of this context rank's slice; first: as in `begin`."""
        begin = self.parts.first_place(length) if first is None else first
        cos, sin, places, slopes = None, None, None, None
        if self.config.positions == "rope":
            end = self._end(begin, length)
            places = None if documents is None else self._places(documents)
            cos, sin = self.angles.values[:, begin:end] if places is None else self.angles.values
        if self.config.positions == "alibi":
            slopes = self.slopes.values
        return Context(sample_keys, cos, sin, places, slopes, documents, first or 0)

    def _end(self, first: int, length: int) -> int:
        """The place after the last position; ValueError if the tables of positions do not reach it."""
        if first + length > self.max_length and self.config.positions in ("learned", "sinusoidal", "rope"):
            raise ValueError(f"{first + length} positions asked for, but the model was made for {self.max_length}")
        return first + length
