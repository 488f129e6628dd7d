"""What every model here is, up to its head: ids -> embedding (+ positions, segments) -> norm -> dropout -> blocks -> norm.

Whole, or the layers of one pipeline stage. A model (`gpt.py`, `bert.py`) is a stack with a head of its own, and says in its
`forward` what the head makes of the hidden states. Weights' type is the type of the residual stream; norms, softmax and the
loss are float32 inside.

Shapes: B batch, S sequence, s this rank's slice of it (= S without sequence parallelism), H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.embedding import embedding
from kernels.rotary import rotary_angles
from parallel.layers import Parts
from pretrain.config.model import ModelConfig
from pretrain.models.blocks import (
    EMBEDDING_SITE,
    Block,
    Context,
    Recompute,
    Table,
    drop,
    local_slopes,
    sinusoids,
)


class Stack(nn.Module):
    """Holds `layers` (global numbers), the embeddings if `first`, the final norm if `last`.

    A tied stage that is last but not first holds its own copy of the embedding under the same name, `tied_copy`, if its
    head gives a vocabulary.
    """

    gives_vocabulary = True

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        vocab_size: int,
        seq_length: int,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        self.is_first, self.is_last = first, last
        self.max_length = max(seq_length, config.max_positions or 0)
        hidden, scale = config.hidden_size, config.initial_scale
        self.tied = config.tie_embeddings and self.gives_vocabulary
        if first or (last and self.tied):
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
        self.blocks = nn.ModuleDict({str(i): Block(config, parts, i, seq_length) for i in numbers})
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
            block.attention.recompute = value == "selective"

    def layers(self) -> Iterator[tuple[str, Block]]:
        """This stage's blocks and their names, in order."""
        for name, block in self.blocks.items():
            assert isinstance(block, Block)
            yield name, block

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
        place = self.parts.first_place(length)
        x = self._embed(inputs, sample_keys, documents, segments, place) if self.is_first else hidden
        assert x is not None, "a stage that is not the first takes `hidden`"
        context = self._context(length, sample_keys, documents, place)
        for block in self.blocks.values():
            if self._recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, context)
        return self._final(x) if self.is_last else x

    def _embed(
        self,
        inputs: Tensor | None,
        sample_keys: Tensor | None,
        documents: Tensor | None,
        segments: Tensor | None,
        first: int,
    ) -> Tensor:
        assert inputs is not None, "the first stage takes `inputs`"
        last = self._check_length(first, inputs.shape[1])
        x = self.embedding(inputs)
        if self.config.positions in ("learned", "sinusoidal"):
            table = self.positions if self.config.positions == "learned" else self.waves.values
            rows = table[None, first:last] if documents is None else embedding(self._places(documents), table)
            x = x + self.parts.scatter(rows).to(x.dtype)
        if self.config.num_segments:
            numbers = torch.zeros_like(inputs) if segments is None else segments
            x = x + embedding(self.parts.scatter(numbers), self.segments).to(x.dtype)
        if self.config.has_embedding_norm:
            x = self.embedding_norm(x)
        rate = self.config.embedding_dropout_rate if self.training else 0.0
        return drop(x, rate, sample_keys, EMBEDDING_SITE, self.parts)

    def _places(self, documents: Tensor) -> Tensor:
        """(B, S) places of this context rank's positions, each in its document."""
        places = torch.arange(documents.shape[1], device=documents.device)
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        return self.parts.own(places - torch.where(begins, places, 0).cummax(dim=1).values)

    def _context(self, length: int, sample_keys: Tensor | None, documents: Tensor | None, first: int) -> Context:
        """Of the positions first : first + length."""
        cos, sin, places, slopes = None, None, None, None
        if self.config.positions == "rope":
            last = self._check_length(first, length)
            places = None if documents is None else self._places(documents)
            cos, sin = self.angles.values[:, first:last] if places is None else self.angles.values
        if self.config.positions == "alibi":
            slopes = self.slopes.values
        return Context(sample_keys, cos, sin, places, slopes, documents)

    def _check_length(self, first: int, length: int) -> int:
        """The place after the last position; ValueError if the tables of positions do not reach it."""
        last = first + length
        if last > self.max_length and self.config.positions in ("learned", "sinusoidal", "rope"):
            raise ValueError(f"{last} positions asked for, but the model was made for {self.max_length}")
        return last

    def _final(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.config.norm_position == "pre" else x
