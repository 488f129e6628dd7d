"""Which architecture of Hugging Face's a model is. A new one is a map of its own and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pretrain.errors import UserError
from pretrain.huggingface.architecture import Architecture, Inexpressible, Json, Settings
from pretrain.huggingface.bert import BERT
from pretrain.huggingface.gpt2 import GPT2
from pretrain.huggingface.heads import read_labels
from pretrain.huggingface.llama import LLAMA, MISTRAL
from pretrain.huggingface.marian import MARIAN
from pretrain.huggingface.neox import NEOX
from pretrain.huggingface.rows import ModelClass
from pretrain.tasks.labels import LabelSet

KNOWN: Sequence[Architecture] = (GPT2, LLAMA, MISTRAL, NEOX, BERT, MARIAN)


def architecture_of(ours: Settings) -> Architecture:
    """The first architecture that has all of our options. Raises UserError where none has, with the options of ours that
    each lacks, the nearest first."""
    refusals: list[tuple[Architecture, list[Inexpressible]]] = []
    for architecture in KNOWN:
        against = _against(architecture, ours)
        if not against:
            return architecture
        if all(reason.option != "kind" for reason in against):
            refusals.append((architecture, against))
    refusals.sort(key=lambda refusal: len(refusal[1]))
    lines = [
        f"  {architecture.model_type} has no {', no '.join(f'model.{reason}' for reason in against)}"
        for architecture, against in refusals
    ]
    raise UserError("\n".join(["no architecture of Hugging Face's can have all of this model's options:", *lines]))


def _against(architecture: Architecture, ours: Settings) -> list[Inexpressible]:
    against = []
    for option in architecture.options:
        try:
            option.write(ours)
        except Inexpressible as reason:
            against.append(reason)
    return against


class Read(NamedTuple):
    """What a config.json tells of. kind, labels: the objective's, and a task's classes in the order of the outputs."""

    architecture: Architecture
    model: ModelClass
    settings: Settings  # fields of our ModelConfig
    kind: str
    labels: LabelSet


def read_architecture(theirs: Json, name: str) -> Read:
    """name: of config.json, for messages. Raises UserError for an architecture or a class that is not known, or an option
    that we lack."""
    kinds = {architecture.model_type: architecture for architecture in KNOWN}
    kind = theirs.get("model_type")
    architecture = kinds.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise UserError(f"{name}: model_type is {kind!r:.60}; those that can be imported are {', '.join(kinds)}.")
    readable = {model.name: model for model in architecture.classes}
    told = theirs.get("architectures") or [next(iter(readable))]
    if not isinstance(told, list) or len(told) != 1 or not isinstance(told[0], str) or told[0] not in readable:
        raise UserError(f"{name}: architectures is {told!r:.80}; of {kind} {', '.join(readable)} can be read.")
    model = readable[told[0]]
    try:
        return Read(architecture, model, architecture.settings(theirs), *read_labels(model.objectives, theirs))
    except Inexpressible as reason:
        raise UserError(f"{name}: this program has no such option: {reason}.") from reason
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name}: cannot be understood: {error!r:.80}.") from error
