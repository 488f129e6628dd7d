"""Which objective a config names, with what it needs of the vocabulary."""

from __future__ import annotations

import torch

from pretrain.config.run import Config
from pretrain.objectives.causal import Causal
from pretrain.objectives.masked import Masked, Symbols
from pretrain.tokenizer import Tokenizer
from pretrain.vocabulary import Vocabulary

Objective = Causal | Masked
SENTENCE_ENDS = (".", "!", "?", "\n", "\u3002", "\uff01", "\uff1f")


def objective_of(config: Config, tokenizer: Tokenizer, vocabulary: Vocabulary, lanes: int) -> Objective:
    """lanes: of the order that its sample numbers are from."""
    if config.objective.kind == "causal":
        return Causal(config.objective, tokenizer.eos, config.run.seed)
    return Masked(config.objective, symbols_of(tokenizer, vocabulary), config.run.seed, lanes)


def symbols_of(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Symbols:
    special = vocabulary.special
    pieces = [tokenizer.piece(index) for index in range(tokenizer.vocab_size)]
    text = torch.ones(vocabulary.size, dtype=torch.bool)
    text[tokenizer.vocab_size :] = False
    text[[index for index in special.values() if index < tokenizer.vocab_size]] = False
    edges = [_joins(piece) for piece in pieces] + [(False, False)] * (vocabulary.size - len(pieces))
    left, right = torch.tensor(edges).unbind(dim=1)
    ends = [piece.endswith(SENTENCE_ENDS) for piece in pieces] + [False] * (vocabulary.size - len(pieces))
    return Symbols(
        special["mask"],
        special["cls"],
        special["sep"],
        special["eos"],
        text.nonzero()[:, 0],
        left.contiguous(),
        right.contiguous(),
        torch.tensor(ends),
    )


def _joins(piece: str) -> tuple[bool, bool]:
    """Whether a piece goes on with the word before it, and whether one behind it may go on with its own: letters and
    digits without a space between. A byte of a character does both."""
    if piece.startswith("<0x") and piece.endswith(">"):
        return True, True
    return piece[:1].isalnum(), piece[-1:].isalnum()
