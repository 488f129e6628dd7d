"""Which objective a config names, with what it needs of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pretrain.config.run import Config
from pretrain.data.packing import sentence_ends
from pretrain.data.sources import Sources
from pretrain.finetuning.examples import ExampleStream
from pretrain.finetuning.opening import class_weights
from pretrain.finetuning.tasks import Task
from pretrain.objectives.causal import Causal
from pretrain.objectives.labelled import Labelled
from pretrain.objectives.masked import Masked, Symbols
from pretrain.objectives.pairs import Prefix, SequenceToSequence
from pretrain.objectives.spans import SpanCorruption
from pretrain.tokenization.base import Tokenizer
from pretrain.vocabulary import Vocabulary

TextObjective = Causal | Masked | SequenceToSequence | Prefix | SpanCorruption
Objective = TextObjective | Labelled


def objective_for(config: Config, sources: Sources) -> Objective:
    """Of a run, with what its data decide."""
    train = sources.train
    if isinstance(train, ExampleStream):
        return labelled_of(config, train.task, class_weights(train.task, train.examples))
    return objective_of(config, sources.tokenizer, sources.vocabulary, train.lanes, sources.has_rows)


def objective_of(
    config: Config, tokenizer: Tokenizer, vocabulary: Vocabulary, lanes: int, rows: bool = False
) -> TextObjective:
    """lanes: of the order that its sample numbers are from; rows: whether samples are rows of text that were packed."""
    objective, eos, seed = config.objective, tokenizer.eos, config.run.seed
    if objective.kind == "causal":
        return Causal(objective, eos, seed, rows)
    if objective.kind == "sequence-to-sequence":
        return SequenceToSequence(objective, eos, seed)
    if objective.kind == "prefix":
        return Prefix(objective, eos, seed)
    if objective.kind == "span-corruption":
        return SpanCorruption(objective, torch.tensor(vocabulary.sentinels), eos, seed, rows)
    return Masked(objective, symbols_of(tokenizer, vocabulary), seed, lanes, rows)


def labelled_of(config: Config, task: Task, weights: list[float] | None) -> Labelled:
    """weights: of the classes."""
    held = None if weights is None else torch.tensor(weights)
    return Labelled(config.objective.kind, config.run.seed, task.num_rows, held, at_end=config.model.causal)


def symbols_of(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Symbols:
    special, added = vocabulary.special, vocabulary.size - tokenizer.vocab_size
    text = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
    text[[index for index in special.values() if index < tokenizer.vocab_size]] = False
    tables = (*tokenizer.joints, torch.from_numpy(sentence_ends(tokenizer)))
    left, right, ends_sentence = (F.pad(torch.as_tensor(table), (0, added)) for table in tables)
    return Symbols(
        special["mask"],
        special["cls"],
        special["sep"],
        special["eos"],
        text.nonzero()[:, 0],
        left,
        right,
        ends_sentence,
    )
