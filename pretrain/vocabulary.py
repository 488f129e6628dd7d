"""The ids of a model: its tokenizer's, and behind them those that its kind needs and the tokenizer has not."""

from __future__ import annotations

from typing import NamedTuple

from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer

NEEDED: dict[str, tuple[str, ...]] = {"gpt": (), "bert": ("mask", "cls", "sep"), "encoder-decoder": ()}


class Vocabulary(NamedTuple):
    size: int  # rows of the model's embedding, without padding
    special: dict[str, int]  # ids by role: eos, and mask, cls, sep, ... where there are any
    sentinels: tuple[int, ...] = ()  # of span corruption: the first span's is the highest id, as T5's


def vocabulary_of(config: Config, tokenizer: Tokenizer) -> Vocabulary:
    """Raises UserError where model.vocab_size has too few rows."""
    special = dict(tokenizer.special)
    missing = [name for name in NEEDED[config.model.kind] if name not in special]
    special |= {name: tokenizer.vocab_size + place for place, name in enumerate(missing)}
    known = tokenizer.vocab_size + len(missing)
    marks = config.objective.sentinels if config.objective.kind == "span-corruption" else 0
    least, wanted = known + marks, config.model.vocab_size
    if wanted is not None and wanted < least:
        behind = f" and {', '.join(missing)}, which it lacks" if missing else ""
        behind += f" and {marks} sentinels" if marks else ""
        raise UserError(
            f"model.vocab_size: {wanted} rows are too few for the {tokenizer.vocab_size} ids of the tokenizer{behind}; "
            f"give at least {least}, or null to take just those"
        )
    sentinels = tuple(range(least - 1, known - 1, -1))
    return Vocabulary(wanted or least, {**special, "eos": tokenizer.eos}, sentinels)
