"""Which language a text is in, by py3langid (its model travels in the package; of the extra `data`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.data.selection.config import Language
from pretrain.data.selection.rules import SHARES, Array, Group, Rule, group_of
from pretrain.data.selection.words import Texts
from pretrain.errors import UserError


def group(config: Language) -> Group:
    """The one rule: how likely it is that the text is in one of the languages wanted. Raises UserError where the library is
    missing, or does not know a language."""
    identifier = _identifier()
    unknown = sorted(set(config.keep) - set(identifier.labels))
    if unknown:
        known = ", ".join(sorted(identifier.labels))
        raise UserError(f"language.keep: {', '.join(unknown)} cannot be told by py3langid; it knows {known}.")
    wanted = set(config.keep)

    def probability(strings: Sequence[str], _: Texts) -> Array:
        return np.array([_probability(identifier, text[: config.characters], wanted) for text in strings])

    name = f"probability of {' or '.join(config.keep)}"
    return group_of([(Rule(name, least=config.least, scale=SHARES), probability)])


def _probability(identifier: Any, text: str, wanted: set[str]) -> float:
    """Of the languages wanted together; rounded, so that it does not depend on how a machine adds."""
    return round(sum(chance for name, chance in identifier.rank(text) if name in wanted), 4)


@functools.cache
def _identifier() -> Any:
    """Read once a process: half a second."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("The rule on language needs py3langid: pip install 'pretrain-engine[data]'.") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
