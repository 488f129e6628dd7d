"""Whatever is in a file: one clear message or a counted reason, in under two seconds and 300 MB; nothing is executed, nothing
started, nothing written, and nothing opened but what was named. Each case runs in a process of its own that an audit hook
watches (`watched.py`); what each refusal says is tested beside its reader (test_chunks, test_manifest, foreign/)."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from pretrain.config.load import load_config
from pretrain.data.manifest import canonical
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.data.corpus import many_tokens, write_source
from tests.pretrain.data.foreign import test_megatron
from tests.pretrain.data.foreign.tars import member, packed, raw_header
from tests.pretrain.data.test_chunks import HOSTILE, SHARD, Mark, change, of_size, tar_of
from tests.pretrain.data.watched import ACTS, Seen, Watched

SECONDS, BYTES = 2.0, 300 << 20


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with Watched() as process:
        yield process


def assert_harmless(seen: Seen, mark: Path | None = None) -> None:
    assert seen.failed == "" and seen.acts == []
    assert seen.seconds < SECONDS and seen.bytes < BYTES
    assert mark is None or not mark.exists()


def assert_refused(seen: Seen, folder: Path) -> None:
    """One sentence that names the file."""
    assert_harmless(seen)
    assert str(folder) in seen.refused and seen.refused.isprintable() and len(seen.refused) < 1000


# -- what the watching itself can see ----------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_the_watch_sees_what_it_is_there_for(watched: Watched, tmp_path: Path, act: str) -> None:
    (tmp_path / "old").write_text("")
    (tmp_path.parent / f"{tmp_path.name}-other").write_text("")
    with pytest.raises(AssertionError):
        assert_harmless(watched.read(act, tmp_path))


def test_the_watch_lets_what_is_well_pass(watched: Watched, source: Path, tmp_path: Path) -> None:
    seen = watched.read("shards", source)
    assert_harmless(seen)
    assert seen.refused == "" and len(seen.values) == 62 and len(seen.values[0]) == 17


# -- our own shards ----------------------------------------------------------------------------------------------------


MORE_MEMBERS: dict[str, Callable[[Path], bytes]] = {
    "CBOR": lambda _: tar_of("00000004.cbor", b"\xa1\x61a\x01"),
    "a program": lambda _: tar_of("00000004.tok", b"\x7fELF\2\1\1"),
    "a script": lambda mark: tar_of("00000004.sh", f"#!/bin/sh\ntouch {mark}".encode()),
    "a character device": lambda _: tar_of("00000004.tok", b"", tarfile.CHRTYPE),
    "a block device": lambda _: tar_of("00000004.tok", b"", tarfile.BLKTYPE),
    "a named pipe": lambda _: tar_of("00000004.tok", b"", tarfile.FIFOTYPE),
    "a terabyte": lambda _: member(name="00000004.tok", size=b"\x80" + (1 << 40).to_bytes(11, "big")),
    "a bomb": lambda _: gzip.compress(bytes(8 << 20)),
    "a GNU long name": lambda _: tar_of("x" * 200, b"x", tar_format=tarfile.GNU_FORMAT),
}


@pytest.mark.parametrize("kind", [*HOSTILE, *MORE_MEMBERS])
def test_a_hostile_shard_is_refused_before_any_of_its_tokens(
    watched: Watched, source: Path, tmp_path: Path, kind: str
) -> None:
    mark = tmp_path / "mark"
    make = MORE_MEMBERS[kind] if kind in MORE_MEMBERS else HOSTILE[kind][0]
    (source / SHARD).write_bytes(of_size(make(mark), 10_240))
    seen = watched.read("shards", source)
    assert_refused(seen, source / SHARD)
    assert ", chunk 4: " in seen.refused and len(seen.values) == 16 and not mark.exists()  # the chunks 0 to 3


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((folder / "manifest.json").read_bytes())
    edit(value)
    (folder / "manifest.json").write_bytes(canonical(value))


def swap(folder: Path, first: str, second: str) -> None:
    (folder / first).rename(folder / "kept")
    (folder / second).rename(folder / first)
    (folder / "kept").rename(folder / second)


def flip(path: Path, place: int) -> None:
    change(path, place, bytes([path.read_bytes()[place] ^ 1]))


def bomb_in_place(folder: Path) -> None:
    """A compressed shard under its plain name, of the size that the manifest wants."""
    (folder / SHARD).write_bytes(of_size(zstandard.compress(bytes(1 << 30)), 10_240))


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a manifest of a gigabyte": (lambda f: os.truncate(f / "manifest.json", 1 << 30), "manifest.json"),
    "a manifest of 31 MB": (lambda f: put(f / "manifest.json", b'{"a":"' + b"x" * (31 << 20) + b'"}'), "manifest.json"),
    "a manifest of numbers": (lambda f: put(f / "manifest.json", b"[" + b"1," * 1_000_000 + b"1]"), "manifest.json"),
    "a manifest of objects": (lambda f: put(f / "manifest.json", b"[" + b'{"":1},' * 131_000 + b"1]"), "manifest.json"),
    "a manifest 10^5 deep": (lambda f: put(f / "manifest.json", b'{"a":' * 100_000), "manifest.json"),
    "a flipped bit in the manifest": (lambda f: flip(f / "manifest.json", 400), "manifest.json"),
    "a flipped bit in a sidecar": (lambda f: flip(f / "shard-00001.sha256", 40), "shard-00001.sha256"),
    "a flipped bit in a chunk": (lambda f: flip(f / SHARD, 1600), f"{SHARD}, chunk 5"),
    "a flipped bit in the tokenizer": (lambda f: flip(f / "tokenizer.model", 999), "tokenizer.model"),
    "a tokenizer of a terabyte": (lambda f: os.truncate(f / "tokenizer.model", 1 << 40), "tokenizer.model"),
    "a sidecar of a terabyte": (lambda f: os.truncate(f / "shard-00001.sha256", 1 << 40), "shard-00001.sha256"),
    "a shard of a terabyte": (lambda f: os.truncate(f / SHARD, 1 << 40), SHARD),
    "a shard cut inside a member": (lambda f: os.truncate(f / SHARD, 1500), SHARD),
    "a shard cut between members": (lambda f: os.truncate(f / SHARD, 2048), SHARD),
    "swapped shards": (lambda f: swap(f, SHARD, "shard-00002.tar"), SHARD),
    "swapped sidecars": (lambda f: swap(f, "shard-00001.sha256", "shard-00002.sha256"), "shard-00001.sha256"),
    "a shard twice": (lambda f: shutil.copy(f / "shard-00000.tar", f / SHARD), f"{SHARD}, chunk 4"),
    "a shard twice in the index": (
        lambda f: edited(f, lambda value: value["shards"].__setitem__(1, value["shards"][0])),
        "manifest.json",
    ),
    "a shard that is missing": (lambda f: (f / SHARD).unlink(), SHARD),
    "a shard that is missing in the index": (
        lambda f: edited(f, lambda value: value["shards"].pop(1)),
        "manifest.json",
    ),
    "a shard elsewhere": (
        lambda f: edited(f, lambda value: value["shards"][1].update(name="../shard-00001.tar")),
        "manifest.json",
    ),
    "a tokenizer elsewhere": (
        lambda f: edited(f, lambda value: value["tokenizer"].update(file="/etc/passwd")),
        "manifest.json",
    ),
    "a compressed shard": (bomb_in_place, SHARD),
    "a folder in a shard's place": (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), SHARD),
    "a pipe in the manifest's place": (
        lambda f: ((f / "manifest.json").unlink(), os.mkfifo(f / "manifest.json")),
        "manifest.json",
    ),
    "a pipe in the tokenizer's place": (
        lambda f: ((f / "tokenizer.model").unlink(), os.mkfifo(f / "tokenizer.model")),
        "tokenizer.model",
    ),
    "a link in the manifest's place": (
        lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").symlink_to("/etc/passwd")),
        "manifest.json",
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_of_shards_that_is_not_whole_is_refused(watched: Watched, source: Path, what: str) -> None:
    make, named = FOLDERS[what]
    make(source)
    seen = watched.read("shards", source)
    assert_refused(seen, source)
    assert named in seen.refused


def test_an_index_from_other_data_is_refused(
    watched: Watched, source: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Of the same counts, so that only hashes tell them apart."""
    tokens = (many_tokens(1000, tokenizer.vocab_size) + 1) % tokenizer.vocab_size
    other = write_source(tmp_path / "other", tokens, tokenizer, 64, 4)
    shutil.copy(other / "manifest.json", source / "manifest.json")
    seen = watched.read("shards", source)
    assert_refused(seen, source / "shard-00000.sha256")
    assert seen.values == []


def test_ids_beyond_the_vocabulary_are_refused_though_every_hash_is_right(
    watched: Watched, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokens = many_tokens(1000, tokenizer.vocab_size)
    tokens[300] = 65_535
    seen = watched.read("shards", write_source(tmp_path / "s", tokens, tokenizer, 64, 4))
    assert_refused(seen, tmp_path / "s/shard-00001.tar")
    assert "it holds the id 65535, and the vocabulary has 400" in seen.refused


# -- files of elsewhere ------------------------------------------------------------------------------------------------


END = bytes(1024)
HUGE = raw_header(size=b"77777777777\0")  # a text of 8 GiB
TERABYTE = raw_header(size=b"\x80" + (1 << 40).to_bytes(11, "big"))
EXECUTED = ("pkl", "pickle", "pyd", "pth", "pt", "cbor", "npz", "joblib", "sh", "exe", "so")


def object_array(mark: Path) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([Mark(mark)], dtype=object))
    return file.getvalue()


def disguised(mark: Path) -> bytes:
    """Members that are not what their names say."""
    evil = pickle.dumps(Mark(mark))
    program = b"\x7fELF\2\1\1 and more"
    return packed([("a.txt", evil), ("b.json", evil), ("c.npy", evil), ("d.tok", program), ("e.jsonl", program)])


TARS: dict[str, Callable[[Path], bytes]] = {
    "executed.tar": lambda mark: packed((f"a.{kind}", pickle.dumps(Mark(mark))) for kind in EXECUTED),
    "disguised.tar": disguised,
    "object.tar": lambda mark: packed([("a.npy", object_array(mark))]),
    "names.tar": lambda mark: packed((name, b"x") for name in ("../../mark", str(mark), "a/../../mark", "\x1b[2J.txt")),
    "links.tar": lambda _: b"".join(raw_header(kind=b"%d" % n, size=b"00000000000\0") for n in (1, 2, 3, 4, 6)) + END,
    "sparse.tar": lambda _: raw_header(kind=b"S", size=b"00000000000\0") + END,
    "pax.tar": lambda _: packed([("ü" * 120 + ".txt", b"x")], tarfile.PAX_FORMAT),
    "terabyte.tar": lambda _: TERABYTE + b"x" * 512 + END,
    "terabyte.tar.gz": lambda _: gzip.compress(TERABYTE + bytes(64 << 20), 1),
    "bomb.tar.gz": lambda _: gzip.compress(HUGE) + gzip.compress(bytes(16 << 20)) * 20,
    "bomb.tar.zst": lambda _: zstandard.compress(HUGE + bytes(300 << 20)),
    "zeros.tar.zst": lambda _: zstandard.compress(raw_header(size=b"%011o\0" % (64 << 20)) + bytes(64 << 20) + END),
    "named.tar": lambda _: gzip.compress(packed([("a.txt", b"x")])),
    "million.tar.zst": lambda _: zstandard.compress(raw_header(size=b"00000000000\0") * 100_000),
    "brackets.tar.zst": lambda _: zstandard.compress(packed([("a.json", b"[" + b"[]," * (20 << 20) + b"1]")])),
    "deep.tar": lambda _: packed([("a.json", b"[" * 1_000_000)]),
    "cut.tar": lambda _: packed([("a.txt", b"x")], end=False),
    "nothing.tar": lambda _: b"",
}


@pytest.mark.parametrize("name", TARS)
def test_a_hostile_tar_gives_reasons_and_nothing_else(
    watched: Watched, tmp_path: Path, model_file: Path, name: str
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / name).write_bytes(TARS[name](mark))
    seen = watched.read("documents", tmp_path / name, model_file)
    assert_harmless(seen, mark)
    assert sum(seen.skipped.values()) and seen.refused == ""


def dictionary_bomb(path: Path) -> None:
    """A text of 10 MB in a hundred thousand rows."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, "i4")), pa.array(["a" * 10_000_000]))
    parquet.write_table(pa.table({"text": text}), path, compression="zstd")


def page_bomb(path: Path) -> None:
    """A page of 140 MB in a few kilobytes."""
    text = pa.array(["a" * (140 << 20)])
    parquet.write_table(pa.table({"text": text}), path, compression="zstd", use_dictionary=False)


def footer(path: Path) -> None:
    path.write_bytes(b"PAR1" + b"\x19\xfc" + b"\xff" * 200_000 + (200_002).to_bytes(4, "little") + b"PAR1")


TABLES: dict[str, Callable[[Path], None]] = {"dictionary": dictionary_bomb, "page": page_bomb, "footer": footer}


@pytest.mark.parametrize("what", TABLES)
def test_a_hostile_table_gives_reasons_and_nothing_else(watched: Watched, tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.parquet"
    TABLES[what](path)
    seen = watched.read("documents", path)
    assert_harmless(seen)
    assert sum(seen.skipped.values()) == 1 and seen.refused == ""


@pytest.mark.parametrize("damage", test_megatron.DAMAGE)
def test_a_hostile_index_is_refused(watched: Watched, tmp_path: Path, model_file: Path, damage: str) -> None:
    path = test_megatron.write(tmp_path, [[[60, 61], [62, 7]], [[63, 64], [65, 7]]])
    test_megatron.DAMAGE[damage][0](path)
    seen = watched.read("documents", path, model_file)
    assert_refused(seen, tmp_path)


# -- numbers that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [".nan", ".inf", "-.inf", "1e400"])
def test_weights_that_are_no_numbers_are_refused_by_their_path(weight: str) -> None:
    with pytest.raises(UserError, match=r"data\.weights"):
        load_config("configs/gpt/demo.yaml", ["data.train=[a, b]", f"data.weights=[{weight}, 1.0]"])
