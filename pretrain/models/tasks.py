"""A pre-trained body with a small head for one task (Devlin et al. 2018, section 4; Radford et al. 2018, section 3.2).

Classification, regression and multiple choice read one state of a sequence: of an encoder [CLS]'s, through the pooler, of a
decoder the last token's. Tagging and question answering read every position's. The head is one product, of a
decoder's one state without a bias (Radford et al. 2018, equation 3).

The head sees the whole sequence on every rank (`Parts.whole`); of context ranks only the first one's loss counts.

Shapes: B examples, N = B R sequences (R of each for multiple choice), S sequence, H hidden, C outputs of a place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.noise import dropout
from parallel.layers import Parts
from pretrain.config.model import ModelConfig
from pretrain.models.attention import SITES
from pretrain.models.bert import Pooler
from pretrain.models.stack import Stack

OF_SEQUENCE = ("classification", "regression", "multiple-choice")
NOWHERE = -1e30  # finite: exp is exactly 0


class TaskModel(Stack):
    """kind: of the objective; num_outputs: C; num_rows: R. label_smoothing: of the loss, while training alone.

    stage: of the model, see `Stack`.
    """

    gives_vocabulary = False

    def __init__(
        self,
        config: ModelConfig,
        parts: Parts,
        vocab_size: int,
        seq_length: int,
        kind: str,
        num_outputs: int,
        num_rows: int = 1,
        label_smoothing: float = 0.0,
        **stage: Any,
    ) -> None:
        super().__init__(config, parts, vocab_size, seq_length, **stage)
        self.kind, self.num_rows, self.label_smoothing = kind, num_rows, label_smoothing
        if not self.is_last:
            return
        if kind in OF_SEQUENCE and not config.causal:
            self.pooler = Pooler(config, parts.picked)
        bias = not (config.causal and kind in OF_SEQUENCE)
        self.task_head = parts.picked.linear(config.hidden_size, num_outputs, bias, config.initial_scale)

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        mask: Tensor,
        sample_keys: Tensor,
        documents: Tensor,
        segments: Tensor,
        places: Tensor,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Shapes as in `pretrain.objectives.batch.TaskBatch`; hidden (N, s, H) from the stage before.

        Returns hidden (N, s, H); on the last stage while training the loss summed over the targets, float32 (1,), and else
        the outputs, float32: (B, 1, C), of multiple choice (B, R, 1), of tags and answers (N, S, C).
        """
        own = self.parts.own
        x = self.states(own(inputs), own(inputs).shape[1], sample_keys, documents, own(segments), hidden)
        if not self.is_last:
            return x
        outputs = self._outputs(x, sample_keys, places, documents)
        if not self.training:
            return outputs
        loss = losses(self.kind, outputs, targets, self.label_smoothing) * mask
        return loss.sum(dtype=outputs.dtype)[None] * float(self.parts.context.rank == 0)

    def _outputs(self, x: Tensor, keys: Tensor, places: Tensor, documents: Tensor) -> Tensor:
        if self.kind not in OF_SEQUENCE:
            states = self.parts.whole(x, None)
            states = states if self.kind == "question-answering" else self._drop(states, keys)
            found = _wide(self.task_head(states))
            if self.kind == "question-answering":
                found = torch.where(documents[..., None] > 0, NOWHERE, found)
            return found
        states = self.parts.whole(x, places)
        if not self.config.causal:
            states = self.pooler(states)
        found = _wide(self.task_head(self._drop(states, keys)))
        if self.num_rows == 1:
            return found
        missing = documents[:, :1, None] > 0  # an example with fewer choices than others
        return torch.where(missing, NOWHERE, found).view(-1, self.num_rows, 1)

    def _drop(self, x: Tensor, keys: Tensor) -> Tensor:
        """In the coordinates of the whole sequence; of a single state in its first row."""
        rate = self.config.residual_dropout_rate if self.training else 0.0
        return dropout(x, rate, keys, SITES * self.config.num_layers + SITES - 1)


def losses(kind: str, outputs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Of each target, shaped as the targets' weights. outputs and targets: as `TaskModel.forward` gives and takes them."""
    if kind == "regression":
        return (outputs[..., 0] - targets).square()
    if kind == "question-answering":  # the mean of the two ends' losses
        return F.cross_entropy(outputs, targets, reduction="none").mean(dim=1, keepdim=True)
    if kind == "multiple-choice":
        return F.cross_entropy(outputs[..., 0], targets[:, 0], reduction="none")[:, None]
    classes = outputs.transpose(1, 2)
    return F.cross_entropy(classes, targets, reduction="none", label_smoothing=label_smoothing)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
