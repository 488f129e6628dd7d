"""How an architecture of Hugging Face's corresponds to ours: the language that the maps are written in.

A map (`gpt2.py`, `llama.py`, ...) is data: options, each a fact about ours and theirs that is checked and carried both ways,
and rows (`rows.py`), each a tensor of theirs and the logical tensors of ours that it is made of, of the body and of each class's
heads. An option of ours that theirs lacks is refused by its name, so is one of theirs that the map says we lack, and so is a
tensor without a row.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.config.model import ModelConfig
from pretrain.huggingface.rows import ModelClass, Row, names_of

Settings = dict[str, Any]  # ours: every field of ModelConfig with its effective value, and vocab_size
Json = dict[str, Any]  # theirs: config.json
MISSING = object()


class Inexpressible(Exception):
    """The other side cannot have this. `option` is the field's name, on the side that has it."""

    def __init__(self, option: str, value: Any, wanted: str) -> None:
        super().__init__(f"{option}: {value!r:.80} ({wanted})")
        self.option = option


# -- options -----------------------------------------------------------------------------------------------------------


class Option(ABC):
    """One fact. Both methods raise Inexpressible."""

    @abstractmethod
    def write(self, ours: Settings) -> Json:
        """Theirs."""

    @abstractmethod
    def read(self, theirs: Json) -> Settings:
        """Ours."""


@dataclass(frozen=True)
class Same(Option):
    """The same value under another name. default: what theirs is where config.json leaves it out."""

    ours: str
    theirs: str
    default: Any = MISSING

    def write(self, ours: Settings) -> Json:
        return {self.theirs: ours[self.ours]}

    def read(self, theirs: Json) -> Settings:
        value = theirs.get(self.theirs, self.default)
        if value is MISSING:
            raise Inexpressible(self.theirs, None, "config.json must tell it")
        return {self.ours: value}


@dataclass(frozen=True)
class Choice(Option):
    """A value of ours is one of some names of theirs, the first of which is written."""

    ours: str
    theirs: str
    names: Mapping[Any, tuple[Any, ...]]
    default: Any = MISSING

    def write(self, ours: Settings) -> Json:
        value = ours[self.ours]
        if value not in self.names:
            raise Inexpressible(self.ours, value, f"it can be {_listed(self.names)}")
        return {self.theirs: self.names[value][0]}

    def read(self, theirs: Json) -> Settings:
        value = theirs.get(self.theirs, self.default)
        for ours, names in self.names.items():
            if value in names:
                return {self.ours: ours}
        wanted = _listed(name for names in self.names.values() for name in names)
        raise Inexpressible(self.theirs, None if value is MISSING else value, f"it can be {wanted}")


@dataclass(frozen=True)
class Ours(Option):
    """The only value of an option of ours that theirs stands for; theirs does not name it."""

    ours: str
    value: Any

    def write(self, ours: Settings) -> Json:
        if ours[self.ours] != self.value:
            raise Inexpressible(self.ours, ours[self.ours], f"it can be {self.value!r}")
        return {}

    def read(self, theirs: Json) -> Settings:
        return {self.ours: self.value}


@dataclass(frozen=True)
class Equal(Option):
    """Two options of ours that theirs has as one; the second is not named there."""

    ours: str
    like: Callable[[Settings], Any]
    words: str

    def write(self, ours: Settings) -> Json:
        if ours[self.ours] != self.like(ours):
            raise Inexpressible(self.ours, ours[self.ours], f"it can be {self.words}, {self.like(ours)!r}")
        return {}

    def read(self, theirs: Json) -> Settings:
        return {self.ours: None}  # null: what it is like


@dataclass(frozen=True)
class Theirs(Option):
    """The only value of an option of theirs that we stand for; it is theirs too where config.json leaves it out."""

    theirs: str
    value: Any

    def write(self, ours: Settings) -> Json:
        return {self.theirs: self.value}

    def read(self, theirs: Json) -> Settings:
        value = theirs.get(self.theirs, self.value)
        if value != self.value:
            raise Inexpressible(self.theirs, value, f"it can be {self.value!r}")
        return {}


@dataclass(frozen=True)
class Both(Option):
    """By functions, for what is more than a name."""

    writer: Callable[[Settings], Json]
    reader: Callable[[Json], Settings]

    def write(self, ours: Settings) -> Json:
        return self.writer(ours)

    def read(self, theirs: Json) -> Settings:
        return self.reader(theirs)


ONE_STACK = (Ours("decoder_layers", None), Ours("scale_embeddings", False))  # options of all but encoder-decoders
DECODER = (
    *ONE_STACK,
    Ours("kind", "gpt"),
    Ours("segments", 0),
    Ours("embedding_norm", False),
)  # of those that generate


def _listed(values: Iterable[Any]) -> str:
    return " or ".join(map(repr, values))


# -- architectures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A `model_type`: its options, the rows of its body, and its classes, those with fewer heads first.

    prefix: of the body's tensors, which may lack it in a folder of the body alone. ignored, renamed: patterns of tensors in
    older files that hold no weights, or have another name. unsaid: options of ours that do not change what the model
    computes, and that theirs has no place for: left out, with a word. ends: fields with an id, and what it is where
    config.json leaves it out, that are the document end's in every model of ours.
    """

    model_type: str
    prefix: str
    options: tuple[Option, ...]
    rows: tuple[Row, ...]
    classes: tuple[ModelClass, ...]
    ignored: tuple[str, ...] = ()
    unsaid: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    ends: tuple[tuple[str, int], ...] = ()

    @property
    def heads(self) -> set[str]:
        """Our tensors that stand on the body, of all classes."""
        return names_of(row for kind in self.classes for row in (*kind.rows, *kind.optional))

    def class_of(self, objective: str, names: Collection[str]) -> ModelClass:
        """Of a model of these tensors of ours, trained for the objective. Raises Inexpressible."""
        fitting = [kind for kind in self.classes if objective in kind.objectives]
        for kind in fitting:
            if kind.fits(names, self.heads):
                return kind
        if not fitting:
            raise Inexpressible("objective.kind", objective, f"transformers has no class of {self.model_type} for it")
        heads = ", ".join(sorted(set(names) & self.heads)) or "none"
        raise Inexpressible("objective.kind", objective, f"no class of {self.model_type} has just these heads: {heads}")

    def config(self, ours: Settings, kind: ModelClass) -> Json:
        """config.json without what the tokenizer and labels add. Raises Inexpressible."""
        theirs: Json = {"architectures": [kind.name], "model_type": self.model_type}
        for option in self.options:
            theirs.update(option.write(ours))
        return theirs

    def settings(self, theirs: Json) -> Settings:
        """Fields of ModelConfig. Raises Inexpressible."""
        ours: Settings = {}
        for option in self.options:
            ours.update(option.read(theirs))
        return ours

    def rows_of(self, kind: ModelClass, ours: Settings, names: set[str]) -> list[Row]:
        """The rows that hold the tensors `names` of ours, all of them and each once. Raises Inexpressible for a tensor
        that no row has."""
        patterns = (*self.rows, *kind.rows, *kind.optional)
        layers = {"layer": ours["num_layers"], "decoder_layer": ours["decoder_layers"] or 0}
        rows = [row for pattern in patterns for row in pattern.expanded(layers) if names & set(row.ours)]
        held = [name for row in rows for name in row.ours]
        beyond = sorted((names - set(held)) | {name for name in held if name not in names or held.count(name) > 1})
        if beyond:
            raise Inexpressible("model", beyond[0], f"{kind.name} has no place for this tensor")
        return rows

    def names_in(self, kind: ModelClass, stored: Iterable[str], wanted: Iterable[str], tied: bool) -> dict[str, str]:
        """The name that each tensor of a folder has in the rows, and its name there: the latter may lack `prefix`. Without
        what the class does not read, and without an output layer that is tied to the embedding."""
        skipped = {row.theirs for row in kind.rows if tied and row.ours == ("head.weight",)}
        ignored = (*self.ignored, *kind.ignored)
        known, names = set(wanted), {}
        for name in stored:
            now = name
            for pattern, new in self.renamed:
                now = re.sub(pattern, new, now)
            full = now if now in known or self.prefix + now not in known else self.prefix + now
            if full not in skipped and not any(re.fullmatch(pattern, name) for pattern in ignored):
                names[full] = name
        return names


def settings_of(model: ModelConfig, vocab_size: int, length: int) -> Settings:
    """Our options with the values that they take effect with. length: positions that the model was made for."""
    windows = [model.window(layer) for layer in range(max(model.num_layers, model.layers_of_decoder))]
    return {
        **model.model_dump(exclude={"initial", "reset", "lora"}),
        "decoder_layers": model.layers_of_decoder or None,
        "segments": model.num_segments,
        "embedding_norm": model.has_embedding_norm,
        "vocab_size": vocab_size,
        "max_positions": max(length, model.max_positions or 0),
        "num_kv_heads": model.kv_heads,
        "head_size": model.size_of_head,
        "ffn_hidden_size": model.feed_forward_size,
        "attention_window": windows[0] if len(set(windows)) == 1 else windows,
        "embedding_dropout": model.embedding_dropout_rate,
        "residual_dropout": model.residual_dropout_rate,
        "attention_dropout": model.attention_dropout_rate,
    }
