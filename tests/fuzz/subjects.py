"""What is fuzzed: valid files of each format, how they are changed, how they are read, and what may come of it.

A subject's `judge` gets the files as they were read and what the reader gave, and raises AssertionError unless that is right.
It knows the format by other means than the reader: Python's tarfile, NumPy, the values that were written.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st
from pyarrow import parquet

from pretrain.data.documents import Skipped, pieces_of, read_documents, text_files
from pretrain.data.manifest import canonical
from pretrain.data.shards import header
from pretrain.data.stream import Stream
from pretrain.tokenization.base import Tokenizer
from pretrain.tokenization.foreign import load_tokenizer
from pretrain.tokenization.training import train_tokenizer
from tests.fuzz.mutations import changed, changed_json, changed_tar
from tests.pretrain.data.corpus import ODD, many_tokens, stdlib_texts, write_source
from tests.pretrain.data.foreign import test_megatron
from tests.pretrain.data.foreign.tars import packed

Files = dict[str, bytes]
Change = Callable[[bytes], st.SearchStrategy[bytes]]
END = 7  # the id that ends a document in Megatron-LM's files here


@dataclass(frozen=True)
class Read:
    """values: documents as [text, ids or None], or sequences of ids; skipped: reasons."""

    values: list[Any]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Subject:
    """files: valid ones by name; changes: of those that are changed, how. mend: puts right what a change would be found by
    too early. read: of a folder."""

    files: Files
    changes: dict[str, Change]
    read: Callable[[Path], Read]
    judge: Callable[[Files, Read], None]
    mend: Callable[[Files], Files] = lambda files: files


def subjects(folder: Path) -> dict[str, Subject]:
    """All of them; `folder` is for the files that they are made from."""
    model = folder / "small.model"
    train_tokenizer([*stdlib_texts(), *ODD], 400, out=model, max_bytes=20_000)
    tokenizer = load_tokenizer(model)
    return {
        **_shards(folder, tokenizer),
        **_tokenizers(model),
        "megatron": _megatron(folder, tokenizer),
        **_tars(tokenizer),
        **_tables(folder),
    }


def _content(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- our shards --------------------------------------------------------------------------------------------------------


def _read_shards(folder: Path) -> Read:
    stream = Stream([folder], 16, seed=1, shuffle=False)
    try:
        stream.manifests[0].tokenizer()
        numbers = np.arange(min(stream.samples_per_epoch, 1000))
        return Read(stream.read(numbers).tolist(), {})
    finally:
        stream.close()


def _shards(folder: Path, tokenizer: Tokenizer) -> dict[str, Subject]:
    source = write_source(folder / "source", many_tokens(500, tokenizer.vocab_size), tokenizer, 64, 4)
    files, wanted = _content(source), _read_shards(source).values

    def same(_: Files, found: Read) -> None:
        assert found.values == wanted, "other tokens than were written"

    def within(files: Files, found: Read) -> None:
        """Whoever makes both the data and its hashes decides the tokens, but not beyond the vocabulary."""
        stored = np.frombuffer(files["shard-00000.tar"][512 : 512 + 130], "<u2")
        assert found.values[0] == stored[:17].tolist(), "other tokens than are stored"
        assert max(max(row) for row in found.values) < tokenizer.vocab_size, "ids beyond the vocabulary"

    every: dict[str, Change] = {
        name: changed_json if name == "manifest.json" else changed_tar if name.endswith(".tar") else changed
        for name in files
    }
    return {
        **{f"shards: {name}": Subject(files, {name: change}, _read_shards, same) for name, change in every.items()},
        "shards: rehashed": Subject(files, {"shard-00000.tar": changed_tar}, _read_shards, within, _rehashed),
    }


def _rehashed(files: Files) -> Files:
    """With the headers in place and every hash right, so that only what the chunks hold is left to be looked at."""
    shard = bytearray(files["shard-00000.tar"].ljust(10_240, b"\0")[:10_240])
    for chunk in range(4):
        shard[1024 * chunk : 1024 * chunk + 512] = header(chunk, 130)
    sidecar = b"".join(hashlib.sha256(shard[1024 * n + 512 : 1024 * n + 642]).digest() for n in range(4))
    manifest = json.loads(files["manifest.json"])
    manifest["shards"][0]["sha256"] = hashlib.sha256(shard).hexdigest()
    manifest["shards"][0]["sidecar_sha256"] = hashlib.sha256(sidecar).hexdigest()
    made = {"shard-00000.tar": bytes(shard), "shard-00000.sha256": sidecar, "manifest.json": canonical(manifest)}
    return {**files, **made}


# -- tokenizers --------------------------------------------------------------------------------------------------------


TEXTS = [*ODD, "def f(x):\n\treturn [x] * 2\n", "the [MASK] of <s> a 2024 text"]


def _tokenizers(model: Path) -> dict[str, Subject]:
    import tokenizers as library

    byte_level = library.Tokenizer(library.models.BPE())
    byte_level.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    byte_level.train_from_iterator(stdlib_texts(), trainer)
    words = sorted({word for text in stdlib_texts(3) for word in text.lower().split() if word.isalpha()})
    vocabulary = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{word}" for word in words)])
    kinds: dict[str, tuple[bytes, Change]] = {
        "t.model": (model.read_bytes(), changed),
        "tokenizer.json": (byte_level.to_str().encode(), changed_json),
        "vocab.txt": (vocabulary.encode(), changed),
    }
    return {
        f"tokenizers: {name}": Subject({name: data}, {name: change}, _read_tokenizer, _judge_tokenizer)
        for name, (data, change) in kinds.items()
    }


def _read_tokenizer(folder: Path) -> Read:
    [path] = folder.iterdir()
    tokenizer = load_tokenizer(path)
    values = [[tokenizer.vocab_size, tokenizer.eos]]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert isinstance(tokenizer.decode(ids), str)
        assert len(tokenizer.word_starts(ids)) == len(ids) == len(tokenizer.encode_with_offsets(text)[1])
        values.append(ids)
    return Read(values, {})


def _judge_tokenizer(_: Files, found: Read) -> None:
    (size, eos), *encoded = found.values
    assert 0 <= eos < size, "a document end beyond the vocabulary"
    assert all(0 <= index < size for ids in encoded for index in ids), "ids beyond the vocabulary"
    assert all(eos not in ids for ids in encoded), "a text that became a document end"


# -- files of elsewhere ------------------------------------------------------------------------------------------------


def _read_foreign(tokenizer: Tokenizer | None) -> Callable[[Path], Read]:
    def read(folder: Path) -> Read:
        [path] = [path for path in folder.iterdir() if path.suffix != ".bin"]
        skipped = Skipped()
        pieces = [piece for file in text_files([path]) for piece in pieces_of(file)]
        documents = read_documents(pieces, skipped=skipped, tokenizer=tokenizer, eos_id=END if tokenizer else None)
        values = [[text.text, None if text.tokens is None else text.tokens.tolist()] for text in documents]
        return Read(values, skipped.counts)

    return read


def _megatron(folder: Path, tokenizer: Tokenizer) -> Subject:
    (folder / "megatron").mkdir()
    documents = [[[50 + n % 300, 60, 61], [62, 63, 64][: n % 4], [END]] for n in range(40)]
    test_megatron.write(folder / "megatron", documents)

    def judge(files: Files, found: Read) -> None:
        data = files["d.bin"]
        for dtype in ("<i4", "<i8", "<u2", "<i2", "u1", "i1"):
            if len(data) % np.dtype(dtype).itemsize == 0:
                stored = [index for index in np.frombuffer(data, dtype).tolist() if index not in (END, tokenizer.eos)]
                if stored == [index for _, ids in found.values for index in ids]:
                    return
        assert found.skipped, "other ids than the .bin file has"

    changes: dict[str, Change] = {"d.idx": changed, "d.bin": changed}
    return Subject(_content(folder / "megatron"), changes, _read_foreign(tokenizer), judge)


def _tars(tokenizer: Tokenizer) -> dict[str, Subject]:
    ids = np.array([60, 61, END, 62, 63], "<u2")
    array = io.BytesIO()
    np.lib.format.write_array(array, ids)
    members = [(f"part/{number}.txt", text.encode()) for number, text in enumerate(ODD)]
    members += [("a.json", b'{"text": "of the object"}'), ("b.jsonl", b'{"text": "one"}\n{"text": "two"}\n')]
    members += [("c.tok", ids.tobytes()), ("d.npy", array.getvalue()), ("e.jpg", b"x" * 700), ("f.pkl", b"x")]
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    plain = {name: packed(members, number, mtime=1.5 if name == "pax" else 1) for name, number in formats.items()}
    read = _read_foreign(tokenizer)
    wanted = [
        *(text for text in ODD),
        *("of the object", "one", "two"),
        *(tokenizer.decode([first, first + 1]) for first in (60, 62) * 2),
    ]

    def packed_judge(_: Files, found: Read) -> None:
        assert found.skipped.keys() - KNOWN or [text for text, _ in found.values] == wanted, (
            "other texts, without a word"
        )

    compressed = {"a.tar.gz": gzip.compress(plain["ustar"], mtime=0)}
    return {
        **{
            f"tars: {name}": Subject({"a.tar": data}, {"a.tar": changed_tar}, read, _judge_tar)
            for name, data in plain.items()
        },
        "tars: compressed": Subject(compressed, {"a.tar.gz": changed}, read, packed_judge),
    }


KNOWN = {  # what is skipped of the tar as it is
    "a member that is neither text nor tokens",
    "a member that only a program could decode (pickle, torch, CBOR): never opened",
}


def _judge_tar(files: Files, found: Read) -> None:
    """Each text is what some plain member holds, as Python's tarfile sees it."""
    held: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(files["a.tar"]), mode="r:") as tar:
            for member in tar:
                data = tar.extractfile(member) if member.isreg() else None
                if data is not None:
                    held.add(data.read().decode("utf-8", "replace"))
    except (tarfile.TarError, OSError, ValueError, OverflowError):
        pass  # what it saw until then
    for text, ids in found.values:
        known = ids is not None or any(text in _texts_of(data) for data in held)
        assert known, f"a text that no member holds: {text!r:.80}"


def _texts_of(data: str) -> list[str]:
    texts = [data]
    for line in [data, *data.split("\n")]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        texts += [value["text"]] if isinstance(value, dict) and isinstance(value.get("text"), str) else []
    return texts


def _tables(folder: Path) -> dict[str, Subject]:
    texts = [*ODD, *stdlib_texts(3), *(f"text {number}" for number in range(300))]
    found: dict[str, Subject] = {}
    for name, options in {
        "zstd": {"compression": "zstd"},
        "snappy": {"compression": "snappy", "use_dictionary": False},
        "delta": {"compression": "none", "use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
    }.items():
        path = folder / "a.parquet"
        table = pa.table({"text": texts})
        parquet.write_table(table, path, row_group_size=150, write_page_checksum=True, **options)
        data = path.read_bytes()
        found[f"tables: {name}"] = Subject(
            {"a.parquet": data}, {"a.parquet": changed}, _read_foreign(None), _judge_table(data, texts)
        )
    return found


def _judge_table(data: bytes, texts: list[str]) -> Callable[[Files, Read], None]:
    """Pages have checksums, the footer has none: where that is whole, so is the text, or something is skipped."""
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") :]

    def judge(files: Files, found: Read) -> None:
        if files["a.parquet"].endswith(footer) and not found.skipped:
            assert [text for text, _ in found.values] == texts, "other texts, without a word"

    return judge
