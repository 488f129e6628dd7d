"""What the model of a config sees of a sample: the objective's own batch, turned back into rows of tokens and marks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config.run import Config
from pretrain.data.inspecting.samples import (
    FILLER,
    KEPT,
    MASKED,
    NOT_PREDICTED,
    RANDOM,
    SPECIAL,
    Array,
    Row,
    documents_of,
    filler,
)
from pretrain.data.sources import Sources
from pretrain.data.stream import Stream
from pretrain.objectives.batch import Batch, MaskedBatch, PairBatch, TextBatch
from pretrain.objectives.choice import objective_of
from pretrain.vocabulary import Vocabulary


def stream_of(sources: Sources, number: int) -> Stream:
    """The training stream that has a sample number: of the phase that it falls into."""
    streams = [stream for stream in sources.phases if isinstance(stream, Stream)]
    return next(stream for stream in reversed(streams) if stream.begin <= number)


def rows_of(config: Config, sources: Sources, number: int) -> list[Row]:
    """The sequences that a sample is to the model."""
    stream = stream_of(sources, number)
    objective = objective_of(config, sources.tokenizer, sources.vocabulary, stream.lanes)
    numbers = np.array([number], np.int64)
    tokens = stream.read(numbers, objective.also)
    batch = objective(torch.from_numpy(numbers), torch.from_numpy(tokens))
    return rows_of_batch(batch, sources.vocabulary, packed=stream.manifests[0].packing.row > 1)


def rows_of_batch(batch: TextBatch, vocabulary: Vocabulary, packed: bool) -> list[Row]:
    """Of a batch of one sample."""
    if isinstance(batch, MaskedBatch):
        return [_masked(batch, vocabulary)]
    if isinstance(batch, PairBatch):
        return _pair(batch, vocabulary, packed)
    return [_causal(batch, vocabulary, packed)]


def names_of(vocabulary: Vocabulary) -> dict[int, str]:
    """Symbols by id, as they are shown."""
    names = {index: f"[{role.upper()}]" for role, index in vocabulary.special.items()}
    return {**names, **{index: f"[SPAN {place}]" for place, index in enumerate(vocabulary.sentinels)}}


def _causal(batch: Batch, vocabulary: Vocabulary, packed: bool) -> Row:
    """The last target is not among the inputs, and not shown."""
    tokens = _array(batch.inputs)
    predicted = np.concatenate([[True], _array(batch.mask)[:-1] > 0])  # a token is the target of the one before it
    marks = _marks(tokens, predicted, vocabulary, packed)
    return Row(
        "text", tokens, tokens, marks, _documents(tokens, batch.documents, vocabulary), batch.documents is not None
    )


def _masked(batch: MaskedBatch, vocabulary: Vocabulary) -> Row:
    shown = _array(batch.inputs)
    counted = _array(batch.mask) > 0
    places, targets = _array(batch.places)[counted], _array(batch.targets)[counted]
    tokens = shown.copy()
    tokens[places] = targets
    marks = _marks(tokens, np.ones(len(tokens), bool), vocabulary, packed=False)
    for place in places.tolist():
        if shown[place] == vocabulary.special["mask"]:
            marks[place] = MASKED
        else:
            marks[place] = KEPT if shown[place] == tokens[place] else RANDOM
    documents = _documents(tokens, batch.documents, vocabulary)
    segments = None if batch.labels is None else _array(batch.segments)
    return Row("text", tokens, shown, marks, documents, batch.documents is not None, segments)


def _pair(batch: PairBatch, vocabulary: Vocabulary, packed: bool) -> list[Row]:
    targets = _array(batch.targets)
    source = _array(batch.inputs)[: -len(targets)]
    of_both = None if batch.documents is None else batch.documents[0].split([len(source), len(targets)])
    rows = []
    for side, (name, tokens, predicted) in enumerate(
        [
            ("the encoder reads", source, np.ones(len(source), bool)),
            ("the decoder predicts", targets, _array(batch.mask) > 0),
        ]
    ):
        documents = _documents(tokens, None if of_both is None else of_both[side][None], vocabulary)
        marks = _marks(tokens, predicted, vocabulary, packed)
        rows.append(Row(name, tokens, tokens, marks, documents, of_both is not None))
    return rows


def _marks(tokens: Array, predicted: Array, vocabulary: Vocabulary, packed: bool) -> list[str]:
    symbols = {*vocabulary.special.values(), *vocabulary.sentinels} - {vocabulary.special.get("unk", -1)}
    fills = filler(tokens, vocabulary.special["eos"], packed)
    marks = []
    for token, is_predicted, full in zip(tokens.tolist(), predicted.tolist(), fills.tolist(), strict=True):
        other = SPECIAL if token in symbols else ""
        marks.append(FILLER if full else other if is_predicted else NOT_PREDICTED)
    return marks


def _documents(tokens: Array, numbers: Tensor | None, vocabulary: Vocabulary) -> Array:
    return documents_of(tokens, vocabulary.special["eos"]) if numbers is None else _array(numbers)


def _array(values: Tensor) -> np.ndarray[Any, Any]:
    """Of the one sample."""
    return values[0].numpy()
