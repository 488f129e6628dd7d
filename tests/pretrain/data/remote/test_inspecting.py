"""`inspect` of shards at an address tells what it tells of the same shards in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.__main__ import main


@pytest.fixture
def inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: str | Path) -> tuple[int, str]:
        return main(["inspect", *map(str, arguments)]), capsys.readouterr().out

    return run


def test_it_counts_and_shows_the_same(source: Path, serve: Any, inspect: Any) -> None:
    url = serve(source).url
    here, there = (json.loads(inspect(place, "--json")[1]) for place in (source, url))
    assert there.pop("folder") == url and here.pop("folder") == str(source)
    assert here == there
    options = ["--sample", "7", "--seq-length", "16", "--json"]
    [here], [there] = (json.loads(inspect(place, *options)[1]) for place in (source, url))
    assert here["rows"] == there["rows"] and there["source"] == url


def test_verification_reads_what_is_there_now_and_not_the_cache(source: Path, serve: Any, inspect: Any) -> None:
    """Every chunk was read before, and lies in the node's cache as it was."""
    url = serve(source).url
    inspect(url)
    code, told = inspect(url, "--verify")
    assert code == 0 and "are what was written" in told
    shard = source / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    data[1024 + 512] ^= 1
    shard.write_bytes(data)
    code, told = inspect(url, "--verify")
    assert code == 1 and "shard-00001.tar, chunk 5" in told and "are what was written" not in told
