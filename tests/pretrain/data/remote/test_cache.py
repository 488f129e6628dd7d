"""The node's cache with real processes: its bound, one download for all, deaths in the middle, files that went bad."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.remote import cache as module
from pretrain.data.remote.access import RemoteFolder
from pretrain.data.remote.cache import Cache
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from tests.distributed import REPOSITORY
from tests.pretrain.data.corpus import many_tokens, write_source
from tests.pretrain.data.remote.conftest import NewAccess, NewServer
from tests.pretrain.data.remote.servers import Request

SOURCE = "0" * 64
NewReader = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_reader() -> Iterator[NewReader]:
    """`start_reader(url=..., folder=..., size=..., samples=...)`: a process of `tests.pretrain.data.remote.reader`."""
    started = []

    def start(**options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.pretrain.data.remote.reader", json.dumps(options)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        started.append(
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def result(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip()


def hash_of(source: Path, samples: list[int], times: int = 1) -> str:
    """What a reader prints."""
    return hashlib.sha256(Stream([source], 16, seed=1).read(np.array(samples * times)).tobytes()).hexdigest()


def held(folder: Path) -> int:
    """Bytes of all files of sources, at one moment: no size changes while this lock is held."""
    with open(folder / module.COUNT, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        total = 0
        for path in folder.glob("*/*"):
            with suppress(FileNotFoundError):  # empty, or it could not go now
                total += path.stat().st_size
        assert total <= int(file.read() or 0)
    return total


def small(tmp_path: Path, size: int) -> Cache:
    return Cache(tmp_path / "cache", size)


def put(cache: Cache, name: str, size: int, seconds: float = 5.0) -> None:
    assert cache.fill((SOURCE, name), lambda: name.encode() * (size // len(name)), seconds) is not None


def names(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.glob("*/*"))


def is_partial(folder: Path) -> bool:
    return any(path.name.endswith(module.PARTIAL) for path in folder.glob("*/*"))


# -- its bound -------------------------------------------------------------------------------------------------------


def test_it_never_holds_more_than_its_bound_whoever_fills_it(
    source: Path, tmp_path: Path, serve: NewServer, start_reader: NewReader
) -> None:
    """Three processes over six chunks' room for sixteen; the tokenizer and hashes of chunks want their place as well."""
    server, folder = serve(source.parent), tmp_path / "cache"
    tokenizer = (source / "tokenizer.model").stat().st_size
    size, samples = tokenizer + 6 * 642, list(range(62))
    readers = [
        start_reader(url=f"{server.url}/source", folder=str(folder), size=f"{size} B", samples=samples, times=6)
        for _ in range(3)
    ]
    most = 0
    while any(reader.poll() is None for reader in readers):
        if (folder / module.COUNT).exists():
            most = max(most, held(folder))
        time.sleep(0.002)
    assert [result(reader) for reader in readers] == [hash_of(source, samples, 6)] * 3
    assert size // 2 < most <= size
    assert len(server.asked_for(r"\.tar")) > 32  # what went was fetched again


def test_what_was_used_least_recently_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH_SECONDS", 0.0)
    cache = small(tmp_path, 320)
    for name in "abc":
        put(cache, name, 100)
        time.sleep(0.01)
    assert cache.read((SOURCE, "a"), 10, 5) == b"aaaaa"  # used: now b is the oldest
    put(cache, "d", 100)
    assert names(cache) == ["a", "c", "d"]
    assert cache.holds((SOURCE, "c"))  # to be asked for is a use
    put(cache, "e", 100)
    assert names(cache) == ["c", "d", "e"]


def test_a_file_beyond_the_bound_is_refused_with_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM_SECONDS", 0.1)
    cache = small(tmp_path, 100)
    put(cache, "b", 50)
    with pytest.raises(UserError, match=r"data.cache.size: 100 bytes have no room for a file of 101 bytes"):
        put(cache, "a", 101)
    assert names(cache) == []


def test_who_finds_no_room_waits_for_those_that_write(tmp_path: Path) -> None:
    cache = small(tmp_path, 150)
    (cache.folder / SOURCE).mkdir()
    path = cache.folder / SOURCE / f".a{module.PARTIAL}"
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"a" * 100)
        file.flush()
        (cache.folder / module.COUNT).write_bytes(b"")
        threading.Timer(0.3, lambda: path.rename(cache.folder / SOURCE / "a")).start()
        start = time.monotonic()
        put(cache, "b", 100)
        assert time.monotonic() - start > 0.2
    assert names(cache) == ["b"]


def test_a_cache_for_less_than_the_shuffle_has_open_is_told(
    tmp_path: Path, tokenizer: Tokenizer, serve: NewServer, new_access: NewAccess
) -> None:
    """25 chunks of 33 KB, of which two lanes have as many open as two windows have."""
    folder = write_source(tmp_path / "large", many_tokens(25 << 14, tokenizer.vocab_size), tokenizer, 1 << 14)
    remote = new_access("400000 B").folder(f"{serve(tmp_path).url}/large")

    def findings(source: Path | RemoteFolder, window: int, **options: Any) -> list[str]:
        return Stream([source], 16, seed=1, lanes=2, window=window, **options).findings

    assert findings(remote, 5) == findings(folder, 99) == findings(remote, 99, shuffle=False) == []
    [told] = findings(remote, 99)
    assert told.startswith("warning: data.cache.size: 0.4 MiB hold less than the 0.8 MiB of chunks")


def test_a_cache_for_less_than_two_chunks_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, serve: NewServer, new_access: NewAccess
) -> None:
    write_source(tmp_path / "large", many_tokens(400_000, tokenizer.vocab_size), tokenizer, 1 << 18)
    url = f"{serve(tmp_path).url}/large"
    with pytest.raises(
        UserError, match=r"data.cache.size: 1,000,000 bytes do not hold two chunks of .*large, 525,312 bytes"
    ):
        Stream([new_access("1 MB").folder(url)], 16, seed=1)
    Stream([new_access("1.1 MB").folder(url)], 16, seed=1)


def test_a_count_that_was_lost_is_made_anew(tmp_path: Path) -> None:
    cache = small(tmp_path, 320)
    for name in "abc":
        put(cache, name, 100)
    for digits in (b"", b"rubbish", b"9" * 20, b"-0000000000000000001"):
        (cache.folder / module.COUNT).write_bytes(digits)
        put(cache, "d", 100)
        assert held(cache.folder) == 300
        cache.remove((SOURCE, "d"))
        put(cache, "c", 100) if "c" not in names(cache) else None
        assert held(cache.folder) <= 320


def test_other_files_in_its_folder_are_left_alone(tmp_path: Path) -> None:
    cache = small(tmp_path, 250)
    (cache.folder / "mine").mkdir()
    (cache.folder / "mine" / "text").write_bytes(b"x" * 1000)
    for name in "abcd":
        put(cache, name, 100)
    assert (cache.folder / "mine" / "text").exists() and len(list(cache.folder.glob("0*/*"))) == 2


# -- several processes -----------------------------------------------------------------------------------------------


def test_ranks_of_a_node_download_once(source: Path, tmp_path: Path, serve: NewServer, start_reader: NewReader) -> None:
    server = serve(source.parent, lambda request, before: "after 0.03")
    samples, options = (
        list(range(62)),
        {"url": f"{server.url}/source", "folder": str(tmp_path / "cache"), "size": "1 MB"},
    )
    readers = [start_reader(samples=samples, **options) for _ in range(2)]
    assert [result(reader) for reader in readers] == [hash_of(source, samples)] * 2
    assert len(server.asked_for(r"\.tar")) == 16
    assert len(server.asked_for(r"\.sha256")) == 4 and len(server.asked_for("tokenizer")) == 1


def test_who_is_killed_in_the_middle_of_a_download_leaves_nothing_wrong(
    source: Path, tmp_path: Path, serve: NewServer, start_reader: NewReader
) -> None:
    """Killed while it holds chunks' locks and the disk has half of one; another waits for these, and goes on at once."""
    hold = threading.Event()

    def fault(request: Request, before: int) -> str:
        if ".tar" in request.path and before == 0:
            hold.wait(30)
        return ""

    server, samples = serve(source.parent, fault), list(range(62))
    options = {"url": f"{server.url}/source", "folder": str(tmp_path / "cache"), "size": "1 MB", "samples": samples}
    dying = start_reader(**options)
    while not server.asked_for(r"\.tar"):
        time.sleep(0.01)
    waiting = start_reader(**options)
    while len(server.asked_for("manifest")) < 2:
        time.sleep(0.01)
    for path in (tmp_path / "cache").glob(f"*/.chunk*{module.PARTIAL}"):
        path.write_bytes(b"half")
    assert is_partial(tmp_path / "cache")
    dying.send_signal(signal.SIGKILL)
    dying.wait()
    killed = time.monotonic()
    hold.set()
    assert result(waiting) == hash_of(source, samples)
    assert time.monotonic() - killed < 10
    assert result(start_reader(**options)) == hash_of(source, samples)
    assert not is_partial(tmp_path / "cache")


def test_kills_at_many_moments_leave_nothing_wrong(
    source: Path, tmp_path: Path, serve: NewServer, start_reader: NewReader
) -> None:
    server, samples = serve(source.parent), list(range(62))
    tokenizer, folder = (source / "tokenizer.model").stat().st_size, tmp_path / "cache"
    options = {"url": f"{server.url}/source", "folder": str(folder), "size": f"{tokenizer + 5 * 642} B"}
    for turn in range(4):
        before = len(server.asked_for(r"\.tar"))
        reader = start_reader(samples=samples, times=1000, **options)
        while len(server.asked_for(r"\.tar")) < before + 3 * turn + 2:
            time.sleep(0.002)
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        assert held(folder) <= tokenizer + 5 * 642
    assert result(start_reader(samples=samples, **options)) == hash_of(source, samples)
    assert not is_partial(folder)


def test_leftovers_of_the_dead_make_room_first(tmp_path: Path) -> None:
    cache = small(tmp_path, 320)
    for name in "ab":
        put(cache, name, 100)
    (cache.folder / SOURCE / f".x{module.PARTIAL}").write_bytes(b"x" * 100)
    (cache.folder / module.COUNT).unlink()
    put(cache, "c", 100)
    assert names(cache) == ["a", "b", "c"]


def test_a_holder_that_is_stopped_is_not_waited_for_longer_than_the_limit(tmp_path: Path) -> None:
    cache, fetched = small(tmp_path, 1000), []

    def fetch() -> bytes:
        fetched.append(1)
        return b"mine"

    (cache.folder / SOURCE).mkdir()
    with open(cache.folder / SOURCE / f".a{module.PARTIAL}", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start = time.monotonic()
        assert cache.fill((SOURCE, "a"), fetch, 0.3) == b"mine"
        assert 0.3 <= time.monotonic() - start < 2
    assert not cache.holds((SOURCE, "a")) and fetched == [1]
    assert cache.fill((SOURCE, "a"), fetch, 0.3) == b"mine"
    assert cache.holds((SOURCE, "a"))


# -- files and disks that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["a bit", "the end", "all", "a link"])
def test_a_file_that_went_bad_on_the_disk_is_fetched_again_once(
    source: Path, tmp_path: Path, serve: NewServer, new_access: NewAccess, spoil: str
) -> None:
    server = serve(source.parent)
    first = Stream([new_access().folder(f"{server.url}/source")], 16, seed=1)
    expected = first.read(np.arange(62))
    [path] = (tmp_path / "cache").glob("*/chunk-00000005")
    data = bytearray(path.read_bytes())
    if spoil == "a bit":
        data[600] ^= 1
    path.unlink()
    if spoil == "a link":
        path.symlink_to(source / "manifest.json")
    else:
        path.write_bytes({"a bit": bytes(data), "the end": bytes(data[:-1]), "all": b""}[spoil])
    again = Stream([new_access().folder(f"{server.url}/source")], 16, seed=1)
    assert np.array_equal(again.read(np.arange(62)), expected)
    assert len(server.asked_for(r"\.tar")) == 17
    assert not path.is_symlink() and path.read_bytes() == (source / "shard-00001.tar").read_bytes()[1024 : 1024 + 642]


@pytest.mark.parametrize("name", ["tokenizer.model", "shard-00002.sha256"])
def test_a_small_file_that_went_bad_is_fetched_again(
    source: Path, tmp_path: Path, serve: NewServer, new_access: NewAccess, name: str
) -> None:
    server = serve(source.parent)
    expected = Stream([new_access().folder(f"{server.url}/source")], 16, seed=1).read(np.arange(62))
    [path] = (tmp_path / "cache").glob(f"*/{name}")
    path.write_bytes(b"x" * 500)
    for chunk in (tmp_path / "cache").glob("*/chunk*"):
        chunk.unlink()
    again = Stream([new_access().folder(f"{server.url}/source")], 16, seed=1)
    assert np.array_equal(again.read(np.arange(62)), expected)
    assert path.read_bytes() == (source / name).read_bytes()
    assert len(server.asked_for(name)) == 2


def test_a_chunk_that_is_gone_while_it_is_in_use_is_fetched_again(
    source: Path, tmp_path: Path, serve: NewServer, new_access: NewAccess
) -> None:
    stream = Stream([new_access().folder(f"{serve(source.parent).url}/source")], 16, seed=1)
    expected = stream.read(np.arange(62))
    stream._chunks[0]._cache.clear()
    for chunk in (tmp_path / "cache").glob("*/chunk*"):
        chunk.unlink()
    assert np.array_equal(stream.read(np.arange(62)), expected)


def fill_up(monkeypatch: pytest.MonkeyPatch, cache: Cache, room: int) -> None:
    """A disk with room for so many bytes of the cache."""
    pwrite = os.pwrite

    def limited(file: int, data: Any, place: int) -> int:
        if len(data) != 20 and sum(path.stat().st_size for path in cache.folder.glob("*/*")) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, place)

    monkeypatch.setattr(os, "pwrite", limited)


def test_a_full_disk_costs_the_files_that_were_used_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small(tmp_path, 10_000)
    for number in range(7):
        put(cache, f"{number}", 100)
        time.sleep(0.002)
    fill_up(monkeypatch, cache, 700)
    put(cache, "7", 100)
    assert cache.read((SOURCE, "7"), 0, 100) == b"7" * 100
    assert len(names(cache)) < 8 and "0" not in names(cache)


def test_a_disk_without_room_for_one_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small(tmp_path, 10_000)
    fill_up(monkeypatch, cache, 50)
    with pytest.raises(
        UserError, match=r"data.cache.dir: .*cache cannot be written: No space left on device. Free some space"
    ):
        put(cache, "a", 100)
    assert names(cache) == []


def test_a_folder_that_others_can_write_or_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(UserError, match=r"data.cache.dir: .*open can be written by others"):
        Cache(open_to_all, 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache.dir: .*cannot be used: Not a directory"):
        Cache(tmp_path / "file" / "cache", 1000)
    assert Cache(tmp_path / "new" / "cache", 1000).folder.stat().st_mode & 0o777 == 0o700
