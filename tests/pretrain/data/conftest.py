"""A tokenizer and a small source, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import load_tokenizer
from pretrain.tokenization.training import train_tokenizer
from tests.pretrain.data.corpus import ODD, many_tokens, stdlib_texts, write_source


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 400 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer([*stdlib_texts(), *ODD], 400, out=path, max_bytes=20_000)
    return path


@pytest.fixture(scope="session")
def tokenizer(model_file: Path) -> Tokenizer:
    return load_tokenizer(model_file)


@pytest.fixture
def source(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """1,000 tokens: chunks of 64, four of them a shard, the last chunk short. May be changed by a test."""
    return write_source(tmp_path / "source", many_tokens(1000, tokenizer.vocab_size), tokenizer, 64, 4)
