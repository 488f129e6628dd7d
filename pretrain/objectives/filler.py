"""What fills a row that its text does not: document ends behind a document's end.

In no objective is filler predicted, hidden or counted. Of a causal row it stands behind all that it could disturb. Where the
model reads in both directions it is a document of its own, also where documents see each other. A row of filler alone (a
chunk that could not be read, say) counts nothing, and neither does a micro-batch of such rows: sums over no targets are 0.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def filler(text: Tensor, eos: int) -> Tensor:
    """(B, L) bool, of text (B, L): ends right behind an end. What stands before the first place is not known: it is none."""
    ends = text == eos
    return ends & F.pad(ends[:, :-1], (1, 0))


def count_filler(text: np.ndarray, eos: int) -> int:
    """Of text (B, L), in the host's memory, the tokens that are filler."""
    ends = text == eos
    return int(np.count_nonzero(ends[:, 1:] & ends[:, :-1]))


def lengths(text: Tensor, eos: int) -> Tensor:
    """(B,) int64: how many tokens of text (B, L) are left without the ends at its end."""
    places = (text != eos).long().cumsum(dim=1).argmax(dim=1)  # of the last token that is no end
    return (places + 1) * (text != eos).any(dim=1)
