"""What the model learns to predict."""

from __future__ import annotations

from typing import Literal

from pretrain.config.section import Section, meaning


class ObjectiveConfig(Section):
    """The training objective."""

    kind: Literal["causal"] = meaning("causal", "causal: each position predicts the next token")
    loss_across_documents: bool = meaning(
        True, "whether a document's first token, predicted from the one before, counts"
    )
    attention_across_documents: bool = meaning(
        True,
        "whether a token sees the documents before its own in the sequence; if not, positions begin anew with each",
    )
    label_smoothing: float = meaning(
        0.0, "share of each target that is spread over the whole vocabulary; in training alone", ge=0, lt=1
    )
    z_loss: float = meaning(
        0.0, "factor of each target's squared logarithm of the softmax's denominator; in training alone", ge=0
    )
