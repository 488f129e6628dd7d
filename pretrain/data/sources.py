"""The data of a run: its training stream and its held-out stream, opened and checked before anything else starts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pretrain.config.folder import CONFIG
from pretrain.config.run import Config
from pretrain.data.manifest import Manifest
from pretrain.data.remote.access import Access, RemoteFolder
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.finetuning.examples import Examples, ExampleStream
from pretrain.finetuning.opening import open_examples
from pretrain.finetuning.tasks import Task
from pretrain.inherit import initial_tokenizer
from pretrain.runs import run_tokenizer
from pretrain.schedule import segments
from pretrain.sizes import Sizes
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import FILES
from pretrain.vocabulary import Vocabulary, vocabulary_of


@dataclass(frozen=True)
class Sources:
    """Text in shards; or, of a `task`, labelled examples, of which those held out are `examples`.

    train: of data.seq_length; `earlier`: of the phases before, in order. Held-out text is of data.seq_length in all phases."""

    train: Stream | ExampleStream
    validation: Stream | None
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    task: Task | None = None
    examples: Examples | None = None
    earlier: tuple[Stream, ...] = ()

    @classmethod
    def open(cls, config: Config) -> Sources:
        """Raises UserError for whatever is wrong with the data or does not fit the model."""
        if config.objective.is_task:
            return cls._of_examples(config)
        data, seed = config.data, config.data_seed
        access = Access(data.cache, data.remote)
        folders = [access.folder(name) for name in data.train_folders]
        held_out = [] if data.validation is None else [access.folder(data.validation)]
        for folder in (*folders, *held_out):
            _check_packing(config, Manifest.load(folder))
        *earlier, train = _streams(config, folders)
        validation = None
        if held_out:
            validation = Stream(held_out, data.seq_length, seed, shuffle=False)
            _check_tokenizers(train, validation)
        tokenizer = train.manifests[0].tokenizer()
        if config.model.initial is not None:
            _check_initial(tokenizer, config.model.initial)
        return cls(train, validation, tokenizer, vocabulary_of(config, tokenizer), earlier=tuple(earlier))

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

    @property
    def sizes(self) -> Sizes:
        """What of the model the data decide."""
        if self.task is None:
            return Sizes(self.vocabulary.size)
        return Sizes(self.vocabulary.size, self.task.num_outputs, self.task.num_rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all recipes: the same exactly when every sample number has the same tokens."""
        recipes = [stream.fingerprint for stream in (*self.phases, self.validation) if stream is not None]
        recipes += [self.examples.digest] if self.examples is not None else []
        return hashlib.sha256(" ".join(recipes).encode()).hexdigest()


def _streams(config: Config, folders: Sequence[Path | RemoteFolder]) -> list[Stream]:
    """Of each phase, which begins with its first segment's first sample."""
    data = config.data
    begins = {segment.phase: segment for segment in reversed(list(segments(config)))}
    return [
        Stream(
            folders,
            phase.data.seq_length,
            config.data_seed,
            data.lanes,
            data.window,
            weights=data.weights,
            begin=begins[number].sample,
            tokens=begins[number].tokens,
        )
        for number, phase in enumerate(config.phases)
    ]


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


def _check_tokenizers(train: Stream, validation: Stream) -> None:
    ours, theirs = train.manifests[0], validation.manifests[0]
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        raise UserError(
            f"data.validation: {theirs.folder} was prepared with another tokenizer than {ours.folder}; "
            f"prepare it again with --tokenizer {ours.tokenizer_path}"
        )
