"""Shards of any size, of tokens that are no text: what a benchmark of reading needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.data.manifest import Manifest
from pretrain.data.packing import CONCATENATED
from pretrain.data.preparing.merge import write_manifest
from pretrain.data.preparing.options import Part
from pretrain.data.shards import CHUNKS_PER_SHARD, TOKENS_PER_CHUNK, Entry, ShardWriter, dtype_of
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import load_tokenizer
from pretrain.tokenization.training import train_tokenizer

DOCUMENT = 1000  # tokens, its end among them


def make(folder: Path, tokens: int) -> Manifest:
    """Write a new folder of about so many tokens, in whole chunks of the usual size. 64 MB are 32 million tokens."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(folder.parent)
    dtype = dtype_of(tokenizer.vocab_size)
    writer = ShardWriter(folder, dtype, TOKENS_PER_CHUNK, CHUNKS_PER_SHARD)
    chunks = max(tokens // TOKENS_PER_CHUNK, 1)
    rest = 1  # the last chunk's last token
    for number in range(chunks):
        ids = np.arange(TOKENS_PER_CHUNK + (rest if number == chunks - 1 else 0)) + number * TOKENS_PER_CHUNK
        made = (ids * 48271 + ids // 127) % tokenizer.vocab_size
        made[DOCUMENT - 1 :: DOCUMENT] = tokenizer.eos
        writer.add(made.astype(dtype))
    tokens = chunks * TOKENS_PER_CHUNK + rest
    entries = [Entry(**entry) for entry in writer.finish()]
    part = Part(documents=tokens // DOCUMENT + 1, tokens=tokens, text_bytes=4 * tokens)
    write_manifest(folder, part, tokenizer, entries, TOKENS_PER_CHUNK, CONCATENATED)
    return Manifest.load(folder)


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "synthetic.model"
    if not path.exists():
        train_tokenizer([Path(__file__).read_text()], 512, out=path)
    return load_tokenizer(path)
