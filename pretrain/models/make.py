"""Which model a config names."""

from __future__ import annotations

from typing import Any

from parallel.layers import Parts
from pretrain.config.run import Config
from pretrain.models.bert import BERT
from pretrain.models.gpt import GPT
from pretrain.models.tasks import TaskModel
from pretrain.models.transformer import EncoderDecoder
from pretrain.sizes import Sizes

Model = GPT | BERT | EncoderDecoder | TaskModel


def make_model(
    config: Config, parts: Parts, shape: Sizes, layers: range | None = None, first: bool = True, last: bool = True
) -> Model:
    """The config's model, or those layers of it and its first or last end."""
    objective, general = config.objective, (config.model, parts, shape.vocab_size, config.data.seq_length)
    options: dict[str, Any] = {
        "layers": layers,
        "first": first,
        "last": last,
        "recompute": config.parallel.recompute,
        "label_smoothing": objective.label_smoothing,
    }
    if objective.has_head:
        return TaskModel(*general, objective.kind, shape.num_outputs, shape.num_rows, **options)
    options["z_loss"] = objective.z_loss
    if config.model.kind == "encoder-decoder":
        return EncoderDecoder(*general[:3], objective.lengths(config.data.seq_length), **options)
    if config.model.kind == "bert":
        return BERT(*general, pairs=objective.pairs != "none", **options)
    return GPT(*general, counts_correct=objective.kind == "instruction", **options)
