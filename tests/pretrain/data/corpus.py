"""Text and shards for these tests, and ways to read shards that share nothing with `pretrain.data`."""

from __future__ import annotations

import hashlib
import itertools
import json
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.packing import CONCATENATED
from pretrain.data.prepare import prepare
from pretrain.data.preparing.merge import write_manifest
from pretrain.data.preparing.options import Options, Part, Report
from pretrain.data.shards import Entry, ShardWriter, dtype_of
from pretrain.tokenization.base import Tokenizer

ODD = [
    "Ärger mit Öl: naïve façade, Ελληνικά, 中文字, кириллица\n",
    "emoji \U0001f680\U0001f469\u200d\U0001f4bb and a flag \U0001f1e9\U0001f1ea; combining e\u0301\u0323\n",
    "  leading, trailing  \n\n\n\tmany   spaces \t\n",
    "windows lines\r\nand old ones\rhere",
    "</s><s><unk><pad><mask><cls><sep> as text <0x41>",
    "\ufeffa byte order mark, a zero-width\u200bspace, \u2028 and \x0b\x0c\x1f",
    "x",
    "no line end at the end",
]


def stdlib_texts(count: int = 12, low: int = 2_000, high: int = 6_000) -> list[str]:
    """Small modules of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    small = (path for path in sorted(folder.glob("*.py")) if low < path.stat().st_size < high)
    return [path.read_bytes().decode() for path, _ in zip(small, range(count), strict=False)]


def write_texts(folder: Path, texts: list[str]) -> Path:
    """A folder with the texts as files whose sorted names keep the order."""
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    return folder


def quietly(texts: Any, out: Path, processes: int = 1, **options: Any) -> Report:
    """`prepare` without its lines."""
    return prepare(texts, out, Options(**options), processes=processes, say=lambda _: None)


def write_source(
    folder: Path, tokens: np.ndarray[Any, Any], tokenizer: Tokenizer, tokens_per_chunk: int, per_shard: int = 512
) -> Path:
    """A folder of shards of just these tokens."""
    writer = ShardWriter(folder, dtype_of(tokenizer.vocab_size), tokens_per_chunk, per_shard)
    writer.add(tokens.astype(dtype_of(tokenizer.vocab_size)))
    entries = [Entry(**entry) for entry in writer.finish()]
    write_manifest(folder, Part(1, len(tokens), len(tokens)), tokenizer, entries, writer.tokens_per_chunk, CONCATENATED)
    return folder


def many_tokens(count: int, vocab_size: int) -> np.ndarray[Any, Any]:
    """Tokens of which any few together say where they are."""
    return (np.arange(count) * 48271 + np.arange(count) ** 2 % 131) % vocab_size


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_with_tarfile(folder: Path) -> np.ndarray[Any, Any]:
    """All tokens of a folder of shards by Python's tar reader: of each member all but the look-ahead token."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    parts = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None
                parts.append(np.frombuffer(data.read(), {"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]]))
    return join(parts)


def read_with_webdataset(folder: Path) -> np.ndarray[Any, Any]:
    """The same by a stock webdataset reader."""
    import webdataset

    manifest = json.loads((folder / "manifest.json").read_bytes())
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dtype = {"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]]
    return join([np.frombuffer(sample["tok"], dtype) for sample in webdataset.WebDataset(shards, shardshuffle=False)])


def join(chunks: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Chunks one after the other; each one's look-ahead token must be the next one's first."""
    for chunk, following in itertools.pairwise(chunks):
        assert chunk[-1] == following[0]
    return np.concatenate([*(chunk[:-1] for chunk in chunks[:-1]), chunks[-1]]).astype(np.int64)


def documents_of(tokens: np.ndarray[Any, Any], tokenizer: Tokenizer) -> list[str]:
    """The texts between document ends."""
    assert tokens[-1] == tokenizer.eos
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos) + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist()) for part in parts]
