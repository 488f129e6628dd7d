"""What of a model its data decide."""

from __future__ import annotations

from typing import NamedTuple

from pretrain.config.model import body_parameters, pair_parameters, parameter_count, pooler_parameters
from pretrain.config.run import Config


class Sizes(NamedTuple):
    """Rows of the vocabulary; of a task outputs of a place, and sequences an example; whether a sequence may end with filler."""

    vocab_size: int
    num_outputs: int = 0
    num_rows: int = 1
    fills_rows: bool = False


def parameters_of(config: Config, shape: Sizes) -> int:
    """Weights of the model, the vocabulary without padding."""
    model, objective, length = config.model, config.objective, config.data.seq_length
    if model.kind == "encoder-decoder":
        return pair_parameters(model, shape.vocab_size, objective.lengths(length))
    if not objective.has_head:
        return parameter_count(model, shape.vocab_size, length, objective.pairs != "none")
    of_sequence = objective.kind not in ("tagging", "question-answering")
    pooler = pooler_parameters(model) if of_sequence and not model.causal else 0
    head = shape.num_outputs * (model.hidden_size + int(not (of_sequence and model.causal)))
    return body_parameters(model, shape.vocab_size, length) + pooler + head
