"""GPT: a causal language model (Radford et al. 2019; Brown et al. 2020), whole or the layers of one pipeline stage.

The stack's hidden states -> logits over the vocabulary -> cross-entropy, summed over the targets.

Shapes: B batch, S sequence, s this rank's slice of it (= S without sequence parallelism), H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.layers import Parts
from pretrain.config.model import ModelConfig
from pretrain.models.attention import Cache
from pretrain.models.stack import Stack


class GPT(Stack):
    """A stack with a language model's head on its last stage.

    stage: of the model, see `Stack`. label_smoothing, z_loss: of the loss, while training alone. counts_correct: without
    training it also gives how many targets are predicted right.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        vocab_size: int,
        seq_length: int,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        counts_correct: bool = False,
        **stage: Any,
    ) -> None:
        super().__init__(config, parts, vocab_size, seq_length, **stage)
        self.label_smoothing, self.z_loss, self.counts_correct = label_smoothing, z_loss, counts_correct
        if self.is_last:
            self.head = parts.head(config.hidden_size, vocab_size, config.initial_scale)
            if config.tie_embeddings:
                self.head.tie(self.embedding.weight)

    def forward(
        self,
        inputs: Tensor | None,
        targets: Tensor | None,
        mask: Tensor | None,
        sample_keys: Tensor | None,
        documents: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """inputs and targets (B, S) ids, mask (B, S), sample_keys (B,), documents (B, S) numbers of the documents if each
        is to be seen alone, hidden (B, s, H) from the stage before.

        Returns hidden (B, s, H), or on the last stage the loss summed over the targets, a float32 scalar: cross-entropy,
        while training with label smoothing and z-loss. Without training, with counts_correct, (2,): behind it how many are
        predicted right.
        """
        inputs, targets, mask = (None if x is None else self.parts.own(x) for x in (inputs, targets, mask))
        x = self.states(inputs, self._length(inputs, targets, hidden), sample_keys, documents, hidden=hidden)
        if not self.is_last:
            return x
        assert targets is not None and mask is not None, "the last stage takes targets and mask"
        smoothing, z_loss = (self.label_smoothing, self.z_loss) if self.training else (0.0, 0.0)
        return self.head(x, targets, mask, smoothing, z_loss, self.counts_correct and not self.training)

    @torch.no_grad()
    def logits(self, inputs: Tensor, caches: dict[str, Cache] | None = None, first: int = 0) -> Tensor:
        """(B, S, V) float32 of inputs (B, S), which stand at places first : first + S; those before are in `caches`."""
        if not (self.is_first and self.is_last):
            raise ValueError("logits need the whole model on one stage")
        if first and caches is None:
            raise ValueError(f"the positions before {first} are missing: pass the caches that hold them")
        x = self.begin(self.embedding(inputs), None, first=first)
        context = self.context(inputs.shape[1], None, None, first)
        for name, block in self.layers():
            x = block(x, context, None if caches is None else caches[name])
        return self.head.logits(self.final(x))

    def make_caches(self, batch: int, length: int) -> dict[str, Cache]:
        """Empty caches for `batch` sequences of up to `length` positions, one a layer."""
        caches = {}
        for name, block in self.layers():
            attention = block.attention
            caches[name] = Cache(batch, length, attention.groups, attention.size, attention.qkv.weight)
        return caches

    def _length(self, inputs: Tensor | None, targets: Tensor | None, hidden: Tensor | None) -> int:
        """S of this context rank's sequence."""
        known = inputs if inputs is not None else targets
        if known is not None:
            return known.shape[1]
        assert hidden is not None
        slices = self.parts.axis.size if self.parts.axis.sequence else 1
        return hidden.shape[1] * slices
