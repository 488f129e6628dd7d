"""The data of a run: its training stream and its held-out stream, opened and checked before anything else starts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from pretrain.config.run import Config
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from pretrain.vocabulary import Vocabulary, vocabulary_of


@dataclass(frozen=True)
class Sources:
    train: Stream
    validation: Stream | None
    tokenizer: Tokenizer
    vocabulary: Vocabulary

    @classmethod
    def open(cls, config: Config) -> Sources:
        """Raises UserError for whatever is wrong with the shards or does not fit the model."""
        data, seed = config.data, config.run.seed
        train = Stream(data.train_folders, data.seq_length, seed, data.lanes, data.window, weights=data.weights)
        validation = None
        if data.validation is not None:
            validation = Stream([data.validation], data.seq_length, seed, shuffle=False)
            _check_tokenizers(train, validation)
        tokenizer = train.manifests[0].tokenizer()
        return cls(train, validation, tokenizer, vocabulary_of(config, tokenizer))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of both recipes: the same exactly when every sample number has the same tokens."""
        recipes = [stream.fingerprint for stream in (self.train, self.validation) if stream is not None]
        return hashlib.sha256(" ".join(recipes).encode()).hexdigest()


def _check_tokenizers(train: Stream, validation: Stream) -> None:
    ours, theirs = train.manifests[0], validation.manifests[0]
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        raise UserError(
            f"data.validation: {theirs.folder} was prepared with another tokenizer than {ours.folder}; "
            f"prepare it again with --tokenizer {ours.tokenizer_path}"
        )
