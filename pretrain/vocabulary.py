"""The ids of a model: its tokenizer's, and behind them those that its kind needs and the tokenizer has not."""

from __future__ import annotations

from typing import NamedTuple

from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer

NEEDED = {"gpt": (), "bert": ("mask", "cls", "sep")}


class Vocabulary(NamedTuple):
    size: int  # rows of the model's embedding, without padding
    special: dict[str, int]  # ids by role: eos, and mask, cls, sep, ... where there are any


def vocabulary_of(config: Config, tokenizer: Tokenizer) -> Vocabulary:
    """Raises UserError where model.vocab_size has too few rows."""
    special = dict(tokenizer.special)
    missing = [name for name in NEEDED[config.model.kind] if name not in special]
    special |= {name: tokenizer.vocab_size + place for place, name in enumerate(missing)}
    least, wanted = tokenizer.vocab_size + len(missing), config.model.vocab_size
    if wanted is not None and wanted < least:
        behind = f" and {', '.join(missing)}, which it lacks" if missing else ""
        raise UserError(
            f"model.vocab_size: {wanted} rows are too few for the {tokenizer.vocab_size} ids of the tokenizer{behind}; "
            f"give at least {least}, or null to take just those"
        )
    return Vocabulary(wanted or least, {**special, "eos": tokenizer.eos})
