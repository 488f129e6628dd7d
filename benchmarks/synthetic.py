"""Shards of any size, of tokens that are no text: what a benchmark of reading needs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pretrain.data.manifest import NAME, Manifest, Shard, canonical, describe
from pretrain.data.shards import CHUNKS_PER_SHARD, TOKENS_PER_CHUNK, ShardWriter, dtype_of
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
    _finish(folder, tokenizer, chunks * TOKENS_PER_CHUNK + rest, writer)
    return Manifest.load(folder)


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "synthetic.model"
    if not path.exists():
        train_tokenizer([Path(__file__).read_text()], 512, out=path)
    return load_tokenizer(path)


def _finish(folder: Path, tokenizer: Tokenizer, tokens: int, writer: ShardWriter) -> None:
    entries = writer.finish()
    left = tokens
    shards = []
    for entry in entries:
        own = min(entry["chunks"] * TOKENS_PER_CHUNK, left) if entry is not entries[-1] else left
        left -= own
        shards.append(Shard(**{**entry, "tokens": own}))
    (folder / tokenizer.file).write_bytes(tokenizer.content)
    manifest = Manifest(
        folder=folder,
        fingerprint="",
        dtype=dtype_of(tokenizer.vocab_size),
        tokens_per_chunk=TOKENS_PER_CHUNK,
        vocab_size=tokenizer.vocab_size,
        tokenizer_file=tokenizer.file,
        tokenizer_sha256=hashlib.sha256(tokenizer.content).hexdigest(),
        special=dict(tokenizer.special),
        documents=tokens // DOCUMENT + 1,
        tokens=tokens,
        text_bytes=4 * tokens,
        shards=tuple(shards),
    )
    (folder / NAME).write_bytes(canonical(describe(manifest)))
