"""A tokenizer for these tests."""

from __future__ import annotations

import pytest

from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.training import train_tokenizer
from tests.pretrain.tokenization.samples import TEXTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 330)
