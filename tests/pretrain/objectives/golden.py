"""What the text objectives make of samples without filler, as hashes: packing must never change what older data give."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config.objective import ObjectiveConfig
from pretrain.objectives.causal import Causal
from pretrain.objectives.masked import Masked, Symbols
from pretrain.objectives.pairs import Prefix, SequenceToSequence
from pretrain.objectives.spans import SpanCorruption

TEXT, EOS, MASK, CLS, SEP, SIZE = 300, 300, 301, 302, 303, 360
NUMBERS = torch.arange(64) * 7919
WIDTH = 49
APART: dict[str, Any] = {"attention_across_documents": False}

HASHES = {
    "causal": "97faa6d42145c112",
    "causal apart": "9eb7a699cd90a47e",
    "masked token none": "6bc6e906470a78d5",
    "masked token next": "3544c428e44d8a35",
    "masked token order": "0e51ee900f96bfbb",
    "masked word none": "6adc1455990125eb",
    "masked word next": "246af4a369f0db4f",
    "masked word order": "b2372cb1eacf3f5c",
    "masked span none": "4364ffbd27db2d45",
    "masked span next": "e129a79aad3739fb",
    "masked span order": "df74d2f2a53afd8d",
    "masked apart": "502d6fcd4d5f408a",
    "spans": "5cbaa27cfa3a3cfc",
    "spans apart": "7bf2e89ab8c47b16",
    "prefix": "e20353bba0772f9d",
    "prefix apart": "d2bdd889aa5faa4d",
    "pairs": "d364244bf053a553",
}


def tokens_of(numbers: Tensor, width: int = WIDTH) -> Tensor:
    """(B, width): the same on every machine, with document ends, of which none is behind another."""
    places = np.arange(width)[None]
    mixed = (
        numbers.numpy()[:, None] * 48271 + places * 40692 + places**2 * 131 + (numbers.numpy()[:, None] * places)
    ) % 2**31
    tokens = torch.from_numpy(mixed % TEXT)
    return torch.where(torch.from_numpy(mixed % 11 == 0) & (torch.arange(width) % 2 == 1), EOS, tokens)


def symbols() -> Symbols:
    ids = torch.arange(SIZE)
    return Symbols(
        MASK, CLS, SEP, EOS, torch.arange(TEXT), ids % 3 != 0, torch.ones(SIZE, dtype=torch.bool), ids % 7 == 0
    )


def objectives(**more: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """more: of the objectives that take it."""
    for name, options in (("causal", {}), ("causal apart", {**APART, "loss_across_documents": False})):
        yield name, lambda options=options: Causal(ObjectiveConfig(kind="causal", **options), EOS, 5, **more)
    for masking in ("token", "word", "span"):
        for pairs in ("none", "next", "order"):
            options = {"masking": masking, "pairs": pairs}
            yield f"masked {masking} {pairs}", lambda options=options: masked(options, **more)
    yield "masked apart", lambda: masked(APART, **more)
    for name, options in (("spans", {}), ("spans apart", APART)):
        yield name, lambda options=options: spans(options, **more)
    for name, options in (("prefix", {}), ("prefix apart", APART)):
        yield name, lambda options=options: Prefix(ObjectiveConfig(kind="prefix", **options), EOS, 5)
    yield "pairs", lambda: SequenceToSequence(ObjectiveConfig(kind="sequence-to-sequence"), EOS, 5)


def masked(options: dict[str, Any], **more: Any) -> Masked:
    return Masked(ObjectiveConfig(kind="masked", **options), symbols(), 5, 8, **more)


def spans(options: dict[str, Any], **more: Any) -> SpanCorruption:
    sentinels = torch.arange(SIZE - 1, SEP, -1)
    return SpanCorruption(ObjectiveConfig(kind="span-corruption", **options), sentinels, EOS, 5, **more)


def batch_of(objective: Any, numbers: Tensor = NUMBERS) -> Any:
    tokens = tokens_of(numbers)
    if objective.also is not None:
        tokens = torch.cat([tokens, tokens_of(torch.from_numpy(objective.also(numbers.numpy())))], dim=1)
    return objective(numbers, tokens)


def hash_of(batch: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(batch._asdict().items()):
        if tensor is not None:
            found.update(
                f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes()
            )
    return found.hexdigest()[:16]


def hashes() -> dict[str, str]:
    return {name: hash_of(batch_of(make())) for name, make in objectives()}
