"""Shards at addresses give the same samples as a folder, whatever a network does to them; what it does for good is named."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pretrain.data import prefetch as prefetching
from pretrain.data.prefetch import prefetch
from pretrain.data.remote.access import Access
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.data.corpus import many_tokens, write_source
from tests.pretrain.data.remote.conftest import NewAccess, NewServer
from tests.pretrain.data.remote.servers import Relay, Request, tries

NUMBERS = np.arange(150)  # more than two epochs of `source`


def opened(access: Access, url: str, **options: Any) -> Stream:
    return Stream([access.folder(url)], 16, seed=1, **options)


def expected(source: Path) -> np.ndarray[Any, Any]:
    return Stream([source], 16, seed=1).read(NUMBERS)


def test_http_gives_the_same_samples_as_the_folder(source: Path, serve: NewServer, new_access: NewAccess) -> None:
    server = serve(source.parent)
    stream = opened(new_access(), f"{server.url}/source")
    local = Stream([source], 16, seed=1)
    assert np.array_equal(stream.read(NUMBERS), expected(source))
    assert stream.fingerprint == local.fingerprint
    assert stream.explain(3) == {**local.explain(3), "source": f"{server.url}/source"}
    assert stream.manifests[0].tokenizer().content == local.manifests[0].tokenizer().content
    stream.close()


def test_the_bytes_fetched_are_those_of_the_chunks_used(
    tmp_path: Path, tokenizer: Tokenizer, serve: NewServer, new_access: NewAccess
) -> None:
    """With headers and hashes: an epoch in windows over a cache of a third of the data, of which two streams read."""
    tokens = many_tokens(48 * 16384 + 1, tokenizer.vocab_size)
    folder = write_source(tmp_path / "large", tokens, tokenizer, 16384, 16)
    server, order = serve(tmp_path), {"seed": 1, "lanes": 4, "window": 2}
    url, local = f"{server.url}/large", Stream([folder], 256, **order)
    streams = [Stream([new_access("528000 B").folder(url)], 256, **order) for _ in range(2)]
    for numbers in np.split(np.arange(local.samples_per_epoch), 96):
        for stream in streams:
            stream._chunks[0]._keep = 1  # the cache of chunks in memory
            assert np.array_equal(stream.read(numbers), local.read(numbers))
    assert len(server.asked_for(r"\.tar$")) == 48 and len(server.asked_for(r"\.sha256$")) == 3
    sent = sum(size for path, size in server.sent.items() if path.endswith((".tar", ".sha256")))
    assert sent <= 1.05 * 48 * 16385 * 2


# -- what goes wrong and is mended ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "503", "short", "wrong", "cut"])
@pytest.mark.parametrize("pattern", [r"\.tar", r"sha256|manifest|tokenizer"])
def test_what_goes_wrong_twice_is_tried_again(
    source: Path, serve: NewServer, new_access: NewAccess, fault: str, pattern: str
) -> None:
    # A manifest has no hash to be known by: what an unsound server makes of it is another manifest, or none.
    wrong = tries(2, fault, pattern if fault not in ("short", "wrong") else pattern.replace("manifest|", ""))
    server = serve(source.parent, wrong)
    stream = opened(new_access(), f"{server.url}/source")
    assert np.array_equal(stream.read(NUMBERS), expected(source))
    assert len(server.asked_for(r"shard-00000.tar")) == (12 if "tar" in pattern else 4)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "the server answered HTTP 500"),
        ("short", "321 bytes came of 642"),
        ("wrong", "its bytes were altered: the SHA-256 is not the recorded one"),
        ("cut", "the connection was cut"),
    ],
)
def test_what_goes_wrong_for_good_names_shard_chunk_and_sample(
    source: Path, serve: NewServer, new_access: NewAccess, fault: str, words: str
) -> None:
    server = serve(source.parent, tries(99, fault, "shard-00002.tar"))
    stream = opened(new_access(retries=2), f"{server.url}/source", shuffle=False)
    with prefetch(stream, ((4 * step, 4) for step in itertools.count()), 0, 1, depth=8) as batches:
        read = [next(batches) for _ in range(8)]  # two shards of four chunks of four samples
        with pytest.raises(UserError) as error:
            next(batches)
    assert np.array_equal(
        np.concatenate([tokens for _, tokens in read]), Stream([source], 16, 1, shuffle=False).read(np.arange(32))
    )
    message = str(error.value)
    assert message.startswith(f"{server.url}/source/shard-00002.tar, chunk 8: {words} (3 tries, ")
    assert "(Sample number 32 is the first to need it.)" in message
    assert len([request for request in server.asked_for("shard-00002.tar") if request.start == 0]) == 3


def test_a_missing_shard_is_told_at_once(source: Path, serve: NewServer, new_access: NewAccess) -> None:
    server = serve(source.parent, tries(99, "404"))
    with pytest.raises(UserError, match=r"shard-0000\d.tar, chunk \d+: there is no such file \(HTTP 404\)"):
        opened(new_access(), f"{server.url}/source").read(NUMBERS[:1])
    assert len(server.asked_for(r"\.tar")) == 1


def test_waits_between_tries_double(source: Path, serve: NewServer, new_access: NewAccess) -> None:
    moments: list[float] = []

    def fault(request: Request, before: int) -> str:
        moments.append(time.monotonic())
        return "500"

    server = serve(source.parent, fault)
    with pytest.raises(UserError, match="4 tries"):
        opened(new_access(backoff_seconds=0.1), f"{server.url}/source")
    gaps = np.diff(moments)
    assert all(0.09 * 2**k < gap < 0.1 * 2**k + 1 for k, gap in enumerate(gaps))


@pytest.mark.parametrize("retries", [0, 3])
def test_a_server_that_never_answers_is_named_after_the_time_limit(
    source: Path, serve: NewServer, new_access: NewAccess, retries: int
) -> None:
    server = serve(source.parent, tries(99, "hang"))
    stream = opened(new_access(timeout_seconds=1.0, retries=retries), f"{server.url}/source")
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"shard-0000\d.tar, chunk \d+: no answer in .* s \(\d tr(y|ies), [01](\.\d+)? s in all"
    ):
        stream.read(NUMBERS[:1])
    assert 0.7 < time.monotonic() - start < 5


def test_a_connection_that_hangs_once_is_given_up_for_another(
    source: Path, serve: NewServer, new_access: NewAccess
) -> None:
    server = serve(source.parent, tries(1, "hang", "shard-00001.tar"))
    stream = opened(new_access(timeout_seconds=2.0), f"{server.url}/source")
    assert np.array_equal(stream.read(NUMBERS), expected(source))


# -- ahead of the loop -----------------------------------------------------------------------------------------------


def waits_for(stream: Stream) -> list[float]:
    """Seconds that a loop of 64 steps of 10 ms waits for each batch of 4 samples."""
    waits = []
    with prefetch(stream, ((4 * step, 4) for step in range(64)), 0, 1, depth=2) as batches:
        for _ in range(64):
            start = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - start)
            time.sleep(0.01)
    stream.close()
    return waits


def test_a_latency_of_50_ms_holds_the_loop_up_once_at_the_start(
    tmp_path: Path,
    tokenizer: Tokenizer,
    serve: NewServer,
    new_access: NewAccess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over 64 chunks, which one after the other would take 3 seconds; samples are located in 4 groups, whose borders hold
    nothing up. Of three runs the best: other work on the machine holds a loop up as well."""
    monkeypatch.setattr(prefetching, "LOCATE", 64)
    write_source(tmp_path / "far", many_tokens(64 * 1024 + 1, tokenizer.vocab_size), tokenizer, 1024)
    server, late = serve(tmp_path, lambda request, before: "after 0.05"), []
    for turn in range(3):
        folder = new_access(name=f"cache-{turn}").folder(f"{server.url}/far")
        first, *later = waits_for(Stream([folder], 256, seed=1, lanes=4, window=2))
        assert len(server.asked_for(r"\.tar")) == 64 * (turn + 1)
        assert server.most_at_once >= 8
        assert first > 0.05  # the latency was there
        late.append([round(wait, 3) for wait in later if wait > 0.02])
        if not late[-1]:
            return
    pytest.fail(f"waits after the first: {late}")


def test_reads_in_flight_and_what_lies_unread_are_bounded(
    source: Path, serve: NewServer, new_access: NewAccess
) -> None:
    server = serve(source.parent, lambda request, before: "after 0.02" if ".tar" in request.path else "")
    stream = opened(new_access("16384 B", in_flight=3), f"{server.url}/source", shuffle=False)  # an eighth: two chunks
    stream.expect(*stream.order.locate(np.arange(60)))
    time.sleep(0.5)
    assert len(server.asked_for(r"\.tar")) == 2 and server.most_at_once <= 2
    stream.gather(*stream.order.locate(np.arange(4)))
    time.sleep(0.2)
    assert len(server.asked_for(r"\.tar")) == 3
    server.fault = lambda request, before: "after 0.3" if ".tar" in request.path else ""
    large = opened(new_access("1 MB", in_flight=3), f"{server.url}/source", shuffle=False)
    large.read(np.arange(60))
    assert server.most_at_once in (3, 4)  # the reader takes one himself where it is not under way yet


def test_a_loop_that_leaves_does_not_wait_for_what_was_to_come(
    source: Path, serve: NewServer, new_access: NewAccess
) -> None:
    server = serve(source.parent, lambda request, before: "after 0.2" if ".tar" in request.path else "")
    stream = opened(new_access(in_flight=1), f"{server.url}/source")
    with prefetch(stream, ((4 * step, 4) for step in itertools.count()), 0, 1) as batches:
        next(batches)
    stream.close()
    asked = len(server.asked_for(r"\.tar"))
    time.sleep(0.5)
    assert len(server.asked_for(r"\.tar")) <= asked + 1


# -- other kinds of addresses ----------------------------------------------------------------------------------------


def test_fsspecs_memory_gives_the_same_samples(source: Path, new_access: NewAccess) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/bucket/source", recursive=True)
    try:
        assert np.array_equal(opened(new_access(), "memory://bucket/source").read(NUMBERS), expected(source))
        memory.rm("/bucket/source/shard-00001.tar")
        with pytest.raises(UserError, match=r"memory://bucket/source/shard-00001.tar, chunk \d: "):
            opened(new_access(name="other"), "memory://bucket/source").read(NUMBERS)
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.fixture
def bucket(source: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the S3 server, where the bucket `corpus` has the source as the folder `a`."""
    import boto3

    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket="corpus")
    for path in source.iterdir():
        client.upload_file(str(path), "corpus", f"a/{path.name}")
    yield client
    for path in source.iterdir():
        client.delete_object(Bucket="corpus", Key=f"a/{path.name}")
    client.delete_bucket(Bucket="corpus")


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_a_real_s3_server_gives_the_same_samples(
    source: Path, s3_server: str, bucket: Any, new_access: NewAccess
) -> None:
    access = new_access(endpoint=s3_server)
    assert np.array_equal(opened(access, "s3://corpus/a").read(NUMBERS), expected(source))
    bucket.delete_object(Bucket="corpus", Key="a/shard-00003.tar")
    other = new_access(name="other", endpoint=s3_server)
    with pytest.raises(UserError, match=r"s3://corpus/a/shard-00003.tar, chunk \d+: .*key does not exist"):
        opened(other, "s3://corpus/a").read(NUMBERS)
    with pytest.raises(UserError, match=r"s3://absent/a/manifest.json: .*bucket does not exist"):
        opened(other, "s3://absent/a")


@pytest.mark.parametrize("fault", ["cut", "500", "reset", "after 0.1"])
def test_an_s3_server_behind_a_bad_network_gives_the_same_samples(
    source: Path, s3_server: str, bucket: Any, new_access: NewAccess, fault: str
) -> None:
    """The first of each three connections."""
    relay = Relay(s3_server, lambda number: fault if number % 3 == 0 else "")
    try:
        access = new_access(endpoint=relay.url, in_flight=4, retries=5)
        assert np.array_equal(opened(access, "s3://corpus/a").read(NUMBERS), expected(source))
        assert relay.connections > 3 or fault == "after 0.1"
    finally:
        relay.close()


def test_a_server_that_speaks_as_googles_gives_the_same_samples(
    source: Path, serve: NewServer, new_access: NewAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = source.parent / "objects" / "download/storage/v1/b/corpus/o"
    objects.mkdir(parents=True)
    for path in source.iterdir():
        (objects / f"a%2F{path.name}?alt=media").write_bytes(path.read_bytes())
    server = serve(source.parent / "objects")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    access = new_access(anonymous=True, allow_private=True)
    assert np.array_equal(opened(access, "gcs://corpus/a").read(NUMBERS), expected(source))
