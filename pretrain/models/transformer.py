"""The encoder-decoder of "Attention Is All You Need" (Vaswani et al. 2017), whole or one pipeline stage.

An encoder reads the source; a causal decoder reads the target's tokens so far and, in each block, the encoder's states.
Source and target share the embedding, and with tied embeddings the output layer as well (section 3.4).

What stages exchange is one tensor, the encoder's states and the decoder's behind them along the sequence: a stage moves
on the part that its layers are of and hands on the other as it is. Both parts are cut by themselves where ranks share a
sequence.

Shapes: B batch, M source, S target (m, s = this rank's slices of them between the parallel layers), H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel.layers import Parts
from pretrain.config.model import ModelConfig
from pretrain.models.attention import TARGET_EMBEDDING_SITE, Cache, Role
from pretrain.models.blocks import Recompute
from pretrain.models.stack import Stack


class EncoderDecoder(nn.Module):
    """Holds `layers` (the encoder's from 0, the decoder's behind them), the embeddings if `first`, the head if `last`.

    lengths: M and S; max_length: tokens of a target at most. label_smoothing, z_loss: of the loss, while training alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        vocab_size: int,
        lengths: tuple[int, int],
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        recompute: Recompute = "none",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.max_length = max(lengths[1], config.max_positions or 0)
        # Both stacks have tables of the longer length, so that a run that starts from this one knows their size.
        config = config.model_copy(update={"max_positions": max(*lengths, config.max_positions or 0)})
        self.config, self.parts = config, parts
        self.is_first, self.is_last = first, last
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        hidden, scale, tied = config.hidden_size, config.initial_scale, config.tie_embeddings
        if first or (last and tied):
            self.embedding = parts.embedding(vocab_size, hidden, scale)
        ours = range(config.total_layers) if layers is None else layers
        depth = config.num_layers
        below = range(min(ours.start, depth), min(ours.stop, depth))
        above = range(max(ours.start - depth, 0), max(ours.stop - depth, 0))
        encodes, decodes = Role(False), Role(True, depth, lengths[0], TARGET_EMBEDDING_SITE)
        ends = depth - 1 in below
        self.encoder = Stack(config, parts, None, lengths[0], below, first, ends, recompute, encodes)
        self.decoder = Stack(config, parts, None, lengths[1], above, first, last, recompute, decodes)
        if last:
            self.head = parts.head(hidden, vocab_size, scale)
            if tied:
                self.head.tie(self.embedding.weight)

    @property
    def tied_copy(self) -> nn.Parameter | None:
        """This stage's copy of the first stage's embedding, whose gradient the two must sum."""
        copied = self.is_last and not self.is_first and self.config.tie_embeddings
        return self.embedding.weight if copied else None

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor,
        sample_keys: Tensor | None,
        documents: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """inputs (B, M + S): ids of the source, and behind them what the decoder reads; targets (B, S) ids, mask (B, S),
        sample_keys (B,); documents (B, M + S): a position sees its own document of either part only, and in neither part
        do the numbers decrease; hidden (B, m + s, H) from the stage before.

        Returns hidden (B, m + s, H), or on the last stage the loss summed over the targets, a float32 scalar: cross-entropy,
        while training with label smoothing and z-loss; and without training (2,), behind it how many targets have the
        highest logit.
        """
        length, own = targets.shape[1], self.parts.own
        (source, tokens), of = _cut(inputs, length), (None, None) if documents is None else _cut(documents, length)
        source, tokens = own(source), own(tokens)
        if hidden is None:
            x = self.encoder.begin(self.embedding(source), sample_keys, of[0])
            y = self.decoder.begin(self.embedding(tokens), sample_keys, of[1])
        else:
            slices = inputs.shape[1] // hidden.shape[1]
            x, y = _cut(hidden, length // slices)
        x = self.encoder.run(x, self.encoder.context(source.shape[1], sample_keys, of[0]))
        context = self.decoder.context(tokens.shape[1], sample_keys, of[1])
        y = self.decoder.run(y, context._replace(memory=x, memory_documents=of[0]))
        if not self.is_last:
            return torch.cat((x, y), dim=1)
        smoothing, z_loss = (self.label_smoothing, self.z_loss) if self.training else (0.0, 0.0)
        return self.head(y, own(targets), own(mask), smoothing, z_loss, not self.training)  # type: ignore[no-any-return]

    # -- generation: the whole model on one process -------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, source: Tensor) -> Tensor:
        """The encoder's states (B, M, H) of source (B, M)."""
        if not (self.is_first and self.is_last):
            raise ValueError("generation needs the whole model on one stage")
        x = self.encoder.begin(self.embedding(source), None)
        return self.encoder.run(x, self.encoder.context(source.shape[1], None, None))

    @torch.no_grad()
    def logits(self, tokens: Tensor, memory: Tensor, caches: dict[str, Cache] | None = None, first: int = 0) -> Tensor:
        """(B, S, V) float32 of what the decoder reads, (B, S) at places first : first + S; those before are in `caches`.
        memory (B, M, H): the encoder's states."""
        if first and caches is None:
            raise ValueError(f"the positions before {first} are missing: pass the caches that hold them")
        y = self.decoder.begin(self.embedding(tokens), None, first=first)
        context = self.decoder.context(tokens.shape[1], None, None, first)._replace(memory=memory)
        for name, block in self.decoder.layers():
            y = block(y, context, None if caches is None else caches[name])
        return self.head.logits(self.decoder.final(y))

    @torch.no_grad()
    def make_caches(self, memory: Tensor, length: int) -> dict[str, Cache]:
        """Caches for targets of up to `length` positions, one a layer, with the keys and values of memory (B, M, H)."""
        caches = {}
        for name, block in self.decoder.layers():
            attention, cross = block.attention, block.cross
            assert cross is not None
            caches[name] = Cache(
                memory.shape[0],
                length,
                attention.groups,
                attention.size,
                attention.qkv.weight,
                cross.keys_values(memory),
            )
        return caches


def _cut(x: Tensor, length: int) -> Any:
    """x (B, M + S, ...) as its parts (B, M, ...) and (B, S, ...) of `length` S."""
    return x.split((x.shape[1] - length, length), dim=1)
