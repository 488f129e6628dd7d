"""Texts as the sequences that a model was pre-trained on: [CLS] A [SEP] B [SEP] for an encoder, A </s> B </s> for a decoder."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pretrain.tokenization.base import Tokenizer
from pretrain.vocabulary import Vocabulary

Array = np.ndarray[Any, np.dtype[np.int64]]


class Sequence(NamedTuple):
    """ids and segments (T,); `begins`: where each text's tokens begin; truncated: tokens that were cut off."""

    ids: Array
    segments: Array
    begins: tuple[int, ...]
    truncated: int = 0


class Format:
    """How texts are joined for one model. length: tokens of a sequence at most; parts: ranks that share a sequence."""

    def __init__(
        self, tokenizer: Tokenizer, vocabulary: Vocabulary, causal: bool, length: int, segments: int, parts: int = 1
    ) -> None:
        self.tokenizer, self.length, self.causal, self.parts = tokenizer, length, causal, parts
        self.opening = [] if causal else [vocabulary.special["cls"]]
        self.closing = [tokenizer.eos] if causal else [vocabulary.special["sep"]]
        self.second = 1 if segments > 1 else 0

    def width(self, longest: int) -> int:
        """Tokens that sequences are padded to, of which the longest has so many: one of eight widths between each power of
        two and the next, so that little is padded and shapes are few, and one that the ranks can share."""
        step = math.lcm(max(1, 1 << max((longest - 1).bit_length() - 4, 0)), self.parts)
        return min(-(-longest // step) * step, max(self.length, longest))

    def num_special(self, num_texts: int) -> int:
        return len(self.opening) + num_texts * len(self.closing)

    def joined(self, texts: list[list[int]]) -> Sequence:
        """Of tokenized texts; the longer one is cut where they are too long together (Devlin et al. 2018's code)."""
        room = self.length - self.num_special(len(texts))
        kept = [list(text) for text in texts]
        while sum(map(len, kept)) > room:
            longest = max(kept, key=len)
            del longest[max(len(longest) - max(1, sum(map(len, kept)) - room), _second(kept)) :]
        ids, segments, begins = list(self.opening), [0] * len(self.opening), []
        for number, text in enumerate(kept):
            begins.append(len(ids))
            ids += [*text, *self.closing]
            segments += [self.second if number else 0] * (len(text) + len(self.closing))
        cut = sum(map(len, texts)) - sum(map(len, kept))
        return Sequence(np.array(ids, np.int64), np.array(segments, np.int64), tuple(begins), cut)


def _second(texts: list[list[int]]) -> int:
    """The length down to which the longest may be cut at once: that of the next one, less than its own."""
    lengths = sorted(map(len, texts))
    return min(lengths[-2] if len(lengths) > 1 else 0, lengths[-1] - 1)
