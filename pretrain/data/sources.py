"""The data of a run: its training stream and its held-out stream, opened and checked before anything else starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.config.folder import CONFIG
from pretrain.config.run import Config
from pretrain.data.manifest import Manifest
from pretrain.data.mixture import Mixture, tempered
from pretrain.data.remote.access import Access
from pretrain.data.stream import Passed, Stream, source_of
from pretrain.errors import UserError
from pretrain.finetuning.examples import Examples, ExampleStream
from pretrain.finetuning.opening import open_examples
from pretrain.finetuning.tasks import Task
from pretrain.inherit import initial_tokenizer
from pretrain.runs import run_tokenizer
from pretrain.schedule import Plan, segments
from pretrain.sizes import Sizes
from pretrain.spikes import Ranges
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import FILES
from pretrain.vocabulary import Vocabulary, vocabulary_of


@dataclass(frozen=True)
class Sources:
    """Text in shards; or, of a `task`, labelled examples, of which those held out are `examples`.

    train: of data.seq_length; `earlier`: of the phases before, in order. Held-out text is of data.seq_length in all phases. Of
    named sources `mixture` says which gives what; `held_out` are those with held-out text of their own, which all together are
    `validation` where there is no other."""

    train: Stream | ExampleStream
    validation: Stream | None
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    task: Task | None = None
    examples: Examples | None = None
    earlier: tuple[Stream, ...] = ()
    mixture: Mixture | None = None
    held_out: Mapping[str, Stream] = field(default_factory=dict)

    @classmethod
    def open(cls, config: Config) -> Sources:
        """Raises UserError for whatever is wrong with the data or does not fit the model."""
        if config.objective.is_task:
            return cls._of_examples(config)
        data, seed = config.data, config.data_seed
        access = Access(data.cache, data.remote)
        validated = [data.validation] if data.validation is not None else list(data.held_out.values())
        folders = dict.fromkeys([*data.train_folders, *validated, *data.held_out.values()])
        # Once: those of 10^13 tokens take half a second.
        manifests = {folder: Manifest.load(access.folder(folder)) for folder in folders}
        for manifest in manifests.values():
            _check_packing(config, manifest)
        mixture = _mixture(config, manifests)
        *earlier, train = _streams(config, manifests, mixture)
        held_out = {
            name: Stream([manifests[part]], data.seq_length, seed, shuffle=False)
            for name, part in data.held_out.items()
        }
        validation = None
        if validated:
            validation = Stream([manifests[part] for part in validated], data.seq_length, seed, shuffle=False)
        for name, stream in {"data.validation": validation, **held_out}.items():
            if stream is not None:
                _check_tokenizers(train, stream, name if name in held_out else "")
        tokenizer = train.manifests[0].tokenizer()
        if config.model.initial is not None:
            _check_initial(tokenizer, config.model.initial)
        vocabulary = vocabulary_of(config, tokenizer)
        return cls(train, validation, tokenizer, vocabulary, earlier=tuple(earlier), mixture=mixture, held_out=held_out)

    @classmethod
    def _of_examples(cls, config: Config) -> Sources:
        tokenizer = _kept_tokenizer(config)
        vocabulary = vocabulary_of(config, tokenizer)
        task, train, held_out = open_examples(config, tokenizer, vocabulary)
        return cls(ExampleStream(task, train, config.data_seed), None, tokenizer, vocabulary, task, held_out)

    @property
    def phases(self) -> list[Stream | ExampleStream]:
        """The training stream of each phase."""
        return [*self.earlier, self.train]

    def stream(self, phase: int, skipped: Ranges = ()) -> Stream | ExampleStream:
        """The training stream of a phase of a run that passed over these ranges."""
        found = self.phases[phase]
        if self.mixture is None or isinstance(found, ExampleStream):
            return found
        return found.ordered(self.mixture.course(skipped).orders[phase])

    def pass_over(self, chunks: Iterable[Passed]) -> None:
        """Read no more of these chunks of training data (data.remote.on_missing)."""
        for stream in self.phases:
            if isinstance(stream, Stream):
                for chunk in chunks:
                    stream.passed.setdefault(chunk, "")

    def seen(self, step: int, skipped: Ranges) -> dict[str, Any]:
        """What of each named source was seen before a step, as a field of metrics; nothing where none are named."""
        return {} if self.mixture is None else {"sources": self.mixture.seen(step, skipped)}

    def event(self, step: int, skipped: Ranges) -> str:
        """What of the mixture changes at a step, in words; empty where nothing does."""
        return "" if self.mixture is None else self.mixture.course(skipped).events.get(step, "")

    @property
    def has_rows(self) -> bool:
        """Whether text is read in rows that were packed, which filler may end."""
        held_out = (self.validation, *self.held_out.values())
        streams = [stream for stream in (*self.phases, *held_out) if isinstance(stream, Stream)]
        return any(manifest.packing.is_rows_of_text for stream in streams for manifest in stream.manifests)

    @property
    def sizes(self) -> Sizes:
        """What of the model the data decide."""
        if self.task is None:
            return Sizes(self.vocabulary.size, fills_rows=self.has_rows)
        return Sizes(self.vocabulary.size, self.task.num_outputs, self.task.num_rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all recipes: the same exactly when every sample number has the same tokens."""
        streams = (*self.phases, self.validation, *self.held_out.values())
        recipes = [stream.fingerprint for stream in streams if stream is not None]
        recipes += [self.examples.digest] if self.examples is not None else []
        return hashlib.sha256(" ".join(recipes).encode()).hexdigest()


def _mixture(config: Config, manifests: Mapping[str, Manifest]) -> Mixture | None:
    """Of the named sources, where there are."""
    if config.data.named is None:
        return None
    ours = [manifests[folder] for folder in config.data.train_folders]
    sizes = [[source_of(manifest, phase.data.seq_length) for manifest in ours] for phase in config.phases]
    plan = Plan(config, sum(source.samples for source in sizes[-1]))
    return Mixture(config.data, config.data_seed, [manifest.tokens for manifest in ours], sizes, plan)


def _streams(config: Config, manifests: Mapping[str, Manifest], mixture: Mixture | None) -> list[Stream]:
    """Of each phase, which begins with its first segment's first sample."""
    data = config.data
    begins = {segment.phase: segment for segment in reversed(list(segments(config)))}
    return [
        Stream(
            [manifests[folder] for folder in data.train_folders],
            phase.data.seq_length,
            config.data_seed,
            data.lanes,
            data.window,
            weights=_weights(config, manifests),
            begin=begins[number].sample,
            tokens=begins[number].tokens,
            mixture=mixture,
            passes=data.remote.on_missing == "pass",
            phase=number,
        )
        for number, phase in enumerate(config.phases)
    ]


def _weights(config: Config, manifests: Mapping[str, Manifest]) -> list[float] | None:
    """Of a list of folders; None: by their numbers of samples."""
    data = config.data
    if data.weights is not None or data.named is not None or data.temperature == 1:
        return data.weights
    return [tempered(manifests[folder].tokens, data.temperature) for folder in data.train_folders]


def _kept_tokenizer(config: Config) -> Tokenizer:
    """Of a run that has begun its own, else of the model that it starts from."""
    run = Path(config.run.dir)
    if (run / CONFIG).is_file() and any((run / name).is_file() for name in FILES):
        return run_tokenizer(run)
    assert config.model.initial is not None
    return initial_tokenizer(config.model.initial)


def _check_initial(tokenizer: Tokenizer, initial: str) -> None:
    if tokenizer.sha256 != initial_tokenizer(initial).sha256:
        raise UserError(
            f"model.initial: {initial} has another tokenizer than the shards; prepare them with --tokenizer {initial}"
        )


def _check_packing(config: Config, manifest: Manifest) -> None:
    kind, held, length = config.objective.kind, manifest.pairs, config.data.seq_length
    if manifest.packing.kind == "sentences" and kind != "masked":
        raise UserError(
            f"{manifest.folder}: its rows are whole sentences, each ended as a document is, and objective.kind: {kind} would "
            f"learn these ends; prepare the text with --packing fit --seq-length {length}, or set objective.kind: masked"
        )
    wanted = config.objective.lengths(length) if kind == "sequence-to-sequence" else None
    if held == wanted:
        return
    if held is None:
        raise UserError(
            f"{manifest.folder}: holds text, but objective.kind: {kind} learns from pairs; make such shards with "
            "`pretrain prepare --pairs`"
        )
    if wanted is None:
        raise UserError(
            f"{manifest.folder}: holds pairs, but objective.kind: {kind} learns from text; set objective.kind: "
            "sequence-to-sequence, or prepare the text without --pairs"
        )
    raise UserError(
        f"{manifest.folder}: its rows have {held[0]} tokens of sources and {held[1]} of targets, not {wanted[0]} and "
        f"{wanted[1]}; set data.seq_length={sum(held)} objective.source_length={held[0]}"
    )


def _check_tokenizers(train: Stream, validation: Stream, name: str) -> None:
    """name: of the source that the held-out text is of; empty: of none."""
    ours, theirs = train.manifests[0], validation.manifests[0]
    path = f"data.train.{name}.validation" if name else "data.validation"
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        raise UserError(
            f"{path}: {theirs.folder} was prepared with another tokenizer than {ours.folder}; "
            f"prepare it again with --tokenizer {ours.tokenizer_path}"
        )
