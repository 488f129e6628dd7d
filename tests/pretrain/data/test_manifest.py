"""Manifests that were damaged, edited or made to harm: refused with one message, never anything but UserError."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data import manifest as manifests
from pretrain.data.manifest import Manifest, canonical
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from tests.pretrain.formats import MANIFEST_WRITERS

FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HUGE = [-1, 0, 1, 2**31, 2**53 + 1, 2**63, 10**30]
OTHER_KINDS: list[Any] = [None, True, 1.5, "1", [], {}, [1], {"a": 1}]


def opened(folder: Path) -> None:
    """All that is done with a manifest before tokens are read."""
    stream = Stream([folder], 16, seed=1)
    stream.close()
    stream.manifests[0].tokenizer()


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        opened(folder)
    return str(error.value)


def write(folder: Path, value: Any) -> None:
    (folder / "manifest.json").write_bytes(canonical(value))


def value_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return value


def test_what_was_written_is_read_back(source: Path) -> None:
    value, found = value_of(source), Manifest.load(source)
    assert manifests.describe(found) == value
    assert (found.tokens, found.chunks, found.tokens_per_chunk) == (1000, 16, 64)
    assert found.first_chunks.tolist() == [0, 4, 8, 12, 16]
    assert found.tokenizer().sha256 == found.tokenizer_sha256


def test_there_is_a_writer_of_each_version() -> None:
    assert sorted(MANIFEST_WRITERS) == list(range(1, manifests.VERSION + 1))


@pytest.mark.parametrize("version", MANIFEST_WRITERS)
def test_shards_of_each_version_give_the_same_samples(source: Path, version: int) -> None:
    now = Stream([source], 16, seed=1)
    MANIFEST_WRITERS[version](source)
    then = Stream([source], 16, seed=1)
    assert value_of(source)["version"] == version == then.manifests[0].version
    assert [then.explain(n) for n in range(40)] == [now.explain(n) for n in range(40)]
    assert then.manifests[0].tokenizer().content == now.manifests[0].tokenizer().content
    now.close()
    then.close()


PACKINGS = {  # of 999 tokens in chunks of 64, and what is wrong with it
    "fit 16": "its chunks do not hold whole rows of 16 tokens",
    "fit 27": "its chunks do not hold whole rows of 27 tokens",
    "fit 0": "lengths are whole numbers of tokens",
    "fit 1": "is no packing",
    "fit": "is no packing",
    "fit 16 16": "is no packing",
    "sentences 3": "is no packing",
    "concat 16": "is no packing",
    "pairs 16": "is no packing",
    "fit  16": "lengths are whole numbers of tokens",
    "fit 16\n": "lengths are whole numbers of tokens",
    "fit ١٦": "lengths are whole numbers of tokens",
    "best 16": "is no packing",
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packing_that_cannot_be_is_refused(source: Path, packing: str) -> None:
    write(source, {**value_of(source), "packing": packing})
    assert PACKINGS[packing] in refusal(source)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("packing", ["fit 16", "sentences 16", "fit-pairs 8 8", "pairs 8 8"])
def test_a_packing_that_a_version_did_not_know_is_refused(source: Path, version: int, packing: str) -> None:
    MANIFEST_WRITERS[version](source)
    write(source, {**value_of(source), "packing": packing})
    if (version, packing) == (3, "pairs 8 8"):
        opened(source)
    else:
        assert f"its packing is not known in version {version}" in refusal(source)


def test_padding_is_counted_from_version_4_on(source: Path) -> None:
    for padding, words in ((-1, "padding must be a whole number"), (1001, "more padding than tokens")):
        write(source, {**value_of(source), "padding": padding})
        assert words in refusal(source)
    write(source, {**value_of(source), "padding": 30})
    assert Manifest.load(source).padding == 30
    MANIFEST_WRITERS[3](source)
    assert Manifest.load(source).padding == 0
    write(source, {**value_of(source), "padding": 0})
    assert "its fields are not those of a manifest" in refusal(source)


def test_a_version_1_manifest_with_what_it_never_had_is_refused(source: Path) -> None:
    write(source, {**value_of(source), "version": 1})
    assert f"{source / 'manifest.json'} is damaged or not a manifest" in refusal(source)


@FUZZ
@given(st.data())
def test_any_bytes_changed_give_a_user_error_or_a_manifest(source: Path, data: st.DataObject) -> None:
    raw = bytearray((source / "manifest.json").read_bytes())
    original = bytes(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        end = start + data.draw(st.sampled_from([0, 1, 1, 2, 8, 200]))
        raw[start:end] = data.draw(st.binary(max_size=3) | st.sampled_from([b"9" * 30, b"{", b"}", b"[[", b"\\ud800"]))
    (source / "manifest.json").write_bytes(raw)
    try:
        opened(source)
    except UserError as error:
        assert str(source) in str(error)
    finally:
        (source / "manifest.json").write_bytes(original)


FIELDS = [
    *((name,) for name in ("tokens", "chunks", "documents", "text_bytes", "tokens_per_chunk", "vocab_size", "version")),
    *((name,) for name in ("dtype", "format", "packing", "shards", "special", "tokenizer")),
    ("padding",),
    *(("special", name) for name in ("eos", "bos", "another")),
    ("tokenizer", "sha256"),
    ("tokenizer", "file"),
    *(("shards", 1, name) for name in ("name", "bytes", "chunks", "tokens", "sha256", "sidecar", "sidecar_sha256")),
    ("shards", 1),
    ("another",),
]
HARMLESS = {("documents",), ("text_bytes",), ("padding",)}  # nothing follows from them


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_every_field_refuses_absurd_numbers_and_other_kinds(source: Path, path: tuple[str | int, ...]) -> None:
    original = value_of(source)
    for new in [*HUGE, *OTHER_KINDS, "../../../etc/passwd", "pipe:touch /tmp/x", "0" * 64, 2**22]:
        value = json.loads(canonical(original))
        place = value
        for part in path[:-1]:
            place = place[part]
        before = place.get(path[-1]) if isinstance(place, dict) else place[path[-1]]  # type: ignore[index]
        place[path[-1]] = new  # type: ignore[index]
        if new == before and type(new) is type(before):
            continue
        write(source, value)
        allowed = path in HARMLESS and type(new) is int and new >= 0
        try:
            opened(source)
        except UserError as error:
            assert str(source) in str(error)
        else:
            assert allowed or path[-1] in ("sha256", "sidecar_sha256"), f"{path} = {new!r} was accepted"


@pytest.mark.parametrize("name", ["tokens", "shards", "special", "format", "vocab_size", "tokenizer"])
def test_a_missing_field_is_refused(source: Path, name: str) -> None:
    value = value_of(source)
    del value[name]
    write(source, value)
    assert f"{source / 'manifest.json'} is damaged or not a manifest" in refusal(source)


def drop_shard(value: dict[str, Any]) -> None:
    value["shards"].pop()


def double_shard(value: dict[str, Any]) -> None:
    value["shards"].append(value["shards"][-1])


def swap_shards(value: dict[str, Any]) -> None:
    value["shards"].reverse()


def move_a_chunk(value: dict[str, Any]) -> None:
    value["shards"][0]["chunks"] += 1
    value["shards"][1]["chunks"] -= 1


def fewer_tokens(value: dict[str, Any]) -> None:
    value["tokens"] -= 1


def no_shards(value: dict[str, Any]) -> None:
    value["shards"] = []


@pytest.mark.parametrize("edit", [drop_shard, double_shard, swap_shards, move_a_chunk, fewer_tokens, no_shards])
def test_counts_that_do_not_add_up_are_refused(source: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    value = value_of(source)
    edit(value)
    write(source, value)
    assert "is damaged or not a manifest" in refusal(source)


@pytest.mark.parametrize("chunks", [1 << 19, 1 << 27, 1 << 44])
def test_absurd_counts_that_agree_with_each_other_allocate_nothing(
    source: Path, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 16 TB of one-token chunks in one shard, of 1,024 bytes each."""
    for limit in (
        "MAX_BYTES",
        "MAX_TOKENIZER_BYTES",
    ):  # a read sets aside its limit, though it touches no more than it reads
        monkeypatch.setattr(manifests, limit, 1 << 20)
    shard = {**value_of(source)["shards"][0], "chunks": chunks, "tokens": chunks + 1}
    shard["bytes"] = -(-(chunks * 1024 + 1024) // 10240) * 10240
    write(
        source, {**value_of(source), "chunks": chunks, "tokens": chunks + 1, "tokens_per_chunk": 1, "shards": [shard]}
    )
    tracemalloc.start()
    with pytest.raises(UserError, match="cut short" if chunks == 1 << 19 else "chunks must be a whole number from 1"):
        Stream([source], 1, seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_more_chunks_than_can_be_read_are_refused_however_they_lie(source: Path) -> None:
    """65 shards of 2^20 chunks of one token."""
    first, count = value_of(source)["shards"][0], 1 << 20
    shards = [
        {
            **first,
            "name": f"shard-{number:05d}.tar",
            "sidecar": f"shard-{number:05d}.sha256",
            "chunks": count,
            "tokens": count + (number == 64),
            "bytes": -(-(count * 1024 + 1024) // 10240) * 10240,
        }
        for number in range(65)
    ]
    counts = {"chunks": 65 * count, "tokens": 65 * count + 1, "tokens_per_chunk": 1, "shards": shards}
    write(source, {**value_of(source), **counts})
    assert "68,157,440 chunks are more than the 67,108,864 that can be read" in refusal(source)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null\n",
        b"[]",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"format":' + b"9" * 5000 + b"}",
        b'{"format":"pretrain tokens","version":1e999}',
        b'{"format":"pretrain tokens","version":1,"tokens":NaN}',
        b"," * 2_000_000,
        b" " * ((32 << 20) + 1),
    ],
    ids=range(12),
)
def test_hostile_json_is_refused_within_bounds(source: Path, raw: bytes) -> None:
    (source / "manifest.json").write_bytes(raw)
    assert f"{source / 'manifest.json'}" in refusal(source)


def test_an_edited_spelling_of_the_same_value_is_refused(source: Path) -> None:
    (source / "manifest.json").write_text(json.dumps(value_of(source), indent=1))
    assert "it was edited: it is not in canonical form" in refusal(source)


def test_a_newer_version_says_which_is_read(source: Path) -> None:
    write(source, {**value_of(source), "version": 5})
    assert "has version 5; this program reads versions 1 to 4" in refusal(source)


def test_another_tokenizer_than_the_shards_is_refused(source: Path) -> None:
    path = source / "tokenizer.model"
    path.write_bytes(path.read_bytes() + b"\0")
    assert f"{path} is not the tokenizer of these shards" in refusal(source)
    assert "put back the one that prepare wrote" in refusal(source)


def test_a_folder_that_is_none_or_has_no_shards_says_so(tmp_path: Path) -> None:
    assert f"There is no folder {tmp_path / 'none'} with prepared shards" in refusal(tmp_path / "none")
    assert f"The index {tmp_path / 'manifest.json'} is missing" in refusal(tmp_path)


def test_a_manifest_of_ten_trillion_tokens_is_below_the_limit(source: Path) -> None:
    """37,000 shards: what the limits on its size are made for."""
    value, per_shard = value_of(source), 512
    chunks = 10**13 // (1 << 19)
    shards = []
    for number, first in enumerate(range(0, chunks, per_shard)):
        count = min(per_shard, chunks - first)
        size = count * (512 + -(-2 * ((1 << 19) + 1) // 512) * 512) + 1024
        shards.append(
            {
                **value["shards"][0],
                "name": f"shard-{number:05d}.tar",
                "sidecar": f"shard-{number:05d}.sha256",
                "chunks": count,
                "tokens": count << 19,
                "bytes": -(-size // 10240) * 10240,
            }
        )
    shards[-1]["tokens"] += 1
    tokens = (chunks << 19) + 1
    write(source, {**value, "tokens": tokens, "chunks": chunks, "tokens_per_chunk": 1 << 19, "shards": shards})
    found = Manifest.load(source)
    assert (found.tokens, len(found.shards), int(np.max(found.first_chunks))) == (tokens, len(shards), chunks)
