"""BERT: a bidirectional encoder with its pre-training heads (Devlin et al. 2018), whole or one pipeline stage.

Only the masked positions go through the vocabulary head: their states -> product, activation, norm -> logits over the
vocabulary -> cross-entropy. For sentence pairs the first position's state ([CLS]) -> product, tanh (the pooler) -> two
logits -> cross-entropy. Each loss is summed over its own targets.

Under context parallelism each rank has the masked positions of its own slice, under sequence parallelism the tensor ranks
put theirs together first (`Parts.pick`); from there on the heads work as for a sequence that is not cut.

Shapes: B batch, S sequence, s this rank's slice of it, P masked positions of a sequence at most, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activation import activation
from parallel.layers import Parts
from pretrain.config.model import GATED, ModelConfig
from pretrain.models.stack import Stack


class Transform(nn.Module):
    """norm(activation(x W^T + b)): what a masked position's state meets before the vocabulary."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.activation = activation("gelu" if config.activation in GATED else config.activation)
        self.dense = parts.linear(hidden, hidden, config.biases, config.initial_scale)
        self.norm = parts.norm(config.norm, hidden, config.norm_epsilon, config.biases)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


class Pooler(nn.Module):
    """tanh(x W^T + b) of the first position's state (B, H): the sequence in one vector."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.dense = parts.linear(config.hidden_size, config.hidden_size, config.biases, config.initial_scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class BERT(Stack):
    """A stack with heads for masked tokens and, with `pairs`, for whether two segments belong together.

    stage: of the model, see `Stack`. label_smoothing, z_loss: of the masked tokens' loss, while training alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        vocab_size: int,
        seq_length: int,
        pairs: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        **stage: Any,
    ) -> None:
        super().__init__(config, parts, vocab_size, seq_length, **stage)
        self.pairs, self.label_smoothing, self.z_loss = pairs, label_smoothing, z_loss
        if not self.is_last:
            return
        whole, hidden, scale = parts.picked, config.hidden_size, config.initial_scale
        self.transform = Transform(config, whole)
        self.head = whole.head(hidden, vocab_size, scale, bias=config.biases)
        if config.tie_embeddings:
            self.head.tie(self.embedding.weight)
        if pairs:
            self.pooler = Pooler(config, whole)
            self.pair_head = whole.linear(hidden, 2, config.biases, scale)

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor,
        sample_keys: Tensor | None,
        documents: Tensor | None = None,
        segments: Tensor | None = None,
        places: Tensor | None = None,
        labels: Tensor | None = None,
        labelled: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """inputs and segments (B, S); targets, mask and places (B, P): the ids at the masked places, 1.0 where one counts;
        labels and labelled (B,): of the pair, 1.0 where it counts; sample_keys (B,); documents (B, S) numbers of the
        documents if each is to be seen alone; hidden (B, s, H) from the stage before.

        Returns hidden (B, s, H), or on the last stage float32 sums: of the loss of the masked tokens and of the pairs
        ((1,) or (2,)), and without training behind them how many of each are predicted right.
        """
        own = self.parts.own
        x = self.states(
            own(inputs),
            own(inputs).shape[1],
            sample_keys,
            documents,
            None if segments is None else own(segments),
            hidden,
        )
        if not self.is_last:
            return x
        assert places is not None, "the last stage takes the masked places"
        sums = [self._masked(x, targets, mask, places)]
        if self.pairs:
            assert labels is not None and labelled is not None, "this model takes the pairs' labels"
            sums.append(self._pairs(x, labels, labelled))
        return torch.cat([part[:1] for part in sums] + [part[1:] for part in sums])

    def _masked(self, x: Tensor, targets: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """(1,), or without training (2,)."""
        states, ours = self.parts.pick(x, places)
        smoothing, z_loss = (self.label_smoothing, self.z_loss) if self.training else (0.0, 0.0)
        found = self.head(self.transform(states), targets, mask * ours, smoothing, z_loss, not self.training)
        return found.reshape(-1)  # type: ignore[no-any-return]

    def _pairs(self, x: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
        states, ours = self.parts.pick(x, torch.zeros_like(labels)[:, None])
        logits = self.pair_head(self.pooler(states[:, 0]))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        counts = labelled * ours[:, 0]
        losses = F.cross_entropy(logits, labels, reduction="none") * counts
        if self.training:
            return losses.sum().reshape(1)
        return torch.stack((losses.sum(), ((logits.argmax(dim=1) == labels) * counts).sum()))
