"""What may be read by whom: addresses of every kind, redirects, names that lead elsewhere than they did."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config.remote import RemoteConfig
from pretrain.data.manifest import Manifest
from pretrain.data.remote.access import Access, RemoteFolder
from pretrain.data.remote.addresses import Address, parse_address
from pretrain.data.remote.opening import Opener, is_public, typed_places
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from tests.pretrain.data.remote.conftest import NewAccess, NewServer
from tests.pretrain.data.remote.servers import Files, tries

SECRET = "hunter2"


def refusal(text: str) -> str:
    with pytest.raises(UserError) as error:
        parse_address(text)
    return str(error.value)


# -- what an address is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pipe:cat /etc/passwd", "never by pipe: or from commands"),
        ("ssh://host/shards", "never by ssh:"),
        ("sftp://host/shards", "never by sftp:"),
        ("file:///etc/passwd", "named by its plain path, without file:"),
        ("file:/shards", "named by its plain path"),
        ("hdfs://host/shards", "never by hdfs:"),
        ("data:text/plain,x", "never by data:"),
        ("local:///etc", "never by local:"),
        ("simplecache::s3://bucket/x", "chains of addresses"),
        ("s3://bucket/x::http://host/y", "chains of addresses"),
        ("zip:///etc/x.zip::s3://b/c", "chains of addresses"),
        ("https:host/x", "is no whole address"),
        ("https://", "is no plain address"),
        ("https://host/x?token=1", "without '?'"),
        ("https://host/x#y", "without '?'"),
        ("https://host/a/../../b", "without '?', '#', '..'"),
        ("https://host\\@evil/x", "name or password"),
        ("s3://buc ket/x", "is no plain address"),
        ("https://host/a b", "is no plain address"),
        ("https://host/\x1b]0;title\x07", "is no plain address"),
    ],
)
def test_other_addresses_are_refused_each_for_its_reason(text: str, words: str) -> None:
    message = refusal(text)
    assert words in message and message.isprintable() and "\n" not in message


@pytest.mark.parametrize(
    "text", [f"https://me:{SECRET}@host/x", f"s3://{SECRET}@bucket/x", f"https:/me:{SECRET}@host/x"]
)
def test_a_password_is_refused_and_not_repeated(text: str) -> None:
    message = refusal(text)
    assert "name or password" in message and SECRET not in message


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("https://host:8080/a/b/", Address("https", "host:8080", "a/b")),
        ("HTTP://host", Address("http", "host", "")),
        ("s3://bucket/a%20b", Address("s3", "bucket", "a%20b")),
        ("gcs://bucket/a", Address("gs", "bucket", "a")),
        ("http://[::1]:80/a", Address("http", "[::1]:80", "a")),
        (str(Path("s3://bucket/a")), Address("s3", "bucket", "a")),  # pathlib takes a slash away
        ("shards/train", None),
        ("/data/shards:old", None),
        ("./s3:x", None),
    ],
)
def test_what_is_an_address_and_what_a_path(text: str, address: Address | None) -> None:
    assert parse_address(text) == address


def test_files_of_an_address_are_below_it() -> None:
    assert str(Address("s3", "bucket", "a") / "manifest.json") == "s3://bucket/a/manifest.json"
    assert str(Address("http", "host", "") / "manifest.json") == "http://host/manifest.json"


def test_a_local_folder_may_be_called_what_looks_like_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s3:x").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Access().folder("s3:x") == Path("s3:x")
    assert isinstance(Access().folder("s3://x"), RemoteFolder)


# -- where connections may lead --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),  # where clouds tell a machine its credentials
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "places"),
    [
        ("http://10.0.0.1/x", {("10.0.0.1", 80)}),
        ("https://[fd00::1]:9000/x", {("fd00::1", 9000)}),
        ("http://localhost:9000", {("127.0.0.1", 9000), ("::1", 9000)}),
        ("http://host/x", set()),
        ("http://2130706433/x", set()),  # 127.0.0.1 to getaddrinfo
    ],
)
def test_only_an_address_of_digits_or_localhost_is_trusted_because_it_was_typed(
    url: str, places: set[tuple[str, int]]
) -> None:
    assert typed_places(url) == places


def named(monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> None:
    """The name leads to these addresses, one after the other, as with a name server that changes its mind."""
    rest, ask = list(addresses), socket.getaddrinfo

    def answer(host: Any, *args: Any, **options: Any) -> Any:
        if host != name:
            return ask(host, *args, **options)
        return ask(rest.pop(0) if len(rest) > 1 else rest[0], *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)


def port_of(server: Files) -> int:
    return int(server.server_address[1])


def read(url: str, **options: Any) -> bytes:
    address = parse_address(url)
    assert address is not None
    return Opener(RemoteConfig(**options)).read(address, 0, 100, 5.0)


def test_a_name_that_leads_to_a_private_address_is_refused_unless_allowed(
    tmp_path: Path, serve: NewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"inside")
    server = serve(tmp_path)
    named(monkeypatch, "data.example", "127.0.0.1")
    url = f"http://data.example:{port_of(server)}/file"
    for allowed in (False, ["another.example"]):
        with pytest.raises(UserError, match=r"leads to a private address.*allow_private: \[data.example\]"):
            read(url, allow_private=allowed)
    assert server.requests == []
    assert read(url, allow_private=["data.example"]) == read(url, allow_private=True) == b"inside"


def test_what_a_name_led_to_before_does_not_matter(
    tmp_path: Path, serve: NewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check of its own before the connection would have seen the public address."""
    server = serve(tmp_path)
    named(monkeypatch, "data.example", "93.184.215.14", "127.0.0.1")
    assert socket.getaddrinfo("data.example", 80)[0][4][0] == "93.184.215.14"
    with pytest.raises(UserError, match="leads to a private address"):
        read(f"http://data.example:{port_of(server)}/file")
    assert server.requests == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1"])
def test_other_ways_of_writing_an_address_of_digits_are_refused(tmp_path: Path, serve: NewServer, host: str) -> None:
    inside = serve(tmp_path)
    url = f"http://{host}:{port_of(inside)}/file"
    assert "is no plain address" in refusal(url)
    outside = serve(tmp_path, tries(99, f"to {url}", "."))
    with pytest.raises((UserError, OSError)):
        read(f"{outside.url}/file")
    assert inside.requests == []


def test_a_redirect_to_another_private_address_is_refused_unless_allowed(tmp_path: Path, serve: NewServer) -> None:
    (tmp_path / "file").write_bytes(b"inside")
    inside = serve(tmp_path)
    outside = serve(tmp_path, tries(99, f"to {inside.url}/file", "."))
    with pytest.raises(UserError, match=rf"redirects to '{inside.url}/file', which leads to a private address"):
        read(f"{outside.url}/file")
    assert inside.requests == []
    assert read(f"{outside.url}/file", allow_private=["127.0.0.1"]) == b"inside"


@pytest.mark.parametrize(
    "where", ["https://127.0.0.1/x", "file:///etc/passwd", "ftp://host/x", "gopher://127.0.0.1:70/"]
)
def test_a_redirect_to_another_scheme_is_refused(tmp_path: Path, serve: NewServer, where: str) -> None:
    server = serve(tmp_path, tries(99, f"to {where}", "."))
    with pytest.raises(UserError, match="redirects to another scheme"):
        read(f"{server.url}/file", allow_private=True)


def test_redirects_on_the_same_server_are_followed_but_not_for_ever(tmp_path: Path, serve: NewServer) -> None:
    (tmp_path / "file").write_bytes(b"here")
    server = serve(tmp_path, lambda request, before: "to /file" if request.path == "/old" else "")
    assert read(f"{server.url}/old") == b"here"
    round_and_round = serve(tmp_path, tries(99, "to /file", "."))
    with pytest.raises(UserError, match="redirects more than 5 times"):
        read(f"{round_and_round.url}/file")


def test_a_redirected_source_is_read_as_if_it_were_there(source: Path, serve: NewServer, new_access: NewAccess) -> None:
    moved = serve(source.parent)
    server = serve(source.parent, lambda request, before: f"to {moved.url}{request.path}?signature=1")
    moved.folder = source.parent
    moved.fault = lambda request, before: ""
    access = new_access(allow_private=["127.0.0.1"])
    for path in source.iterdir():  # as a signed address looks to this server
        (source / f"{path.name}?signature=1").symlink_to(path)
    tokens = Stream([access.folder(f"{server.url}/source")], 16, seed=1).read(np.arange(10))
    assert np.array_equal(tokens, Stream([source], 16, seed=1).read(np.arange(10)))


# -- servers that do not do as they should ---------------------------------------------------------------------------


def test_a_server_without_ranges_is_named(source: Path, serve: NewServer, new_access: NewAccess) -> None:
    server = serve(source.parent, tries(99, "whole"))
    with pytest.raises(UserError, match=r"shard-0000\d.tar: its server does not answer ranges of a file"):
        Stream([new_access().folder(f"{server.url}/source")], 16, seed=1).read(np.arange(64))
    assert len(server.asked_for(r"\.tar")) <= 17


def test_an_answer_without_end_is_not_read_to_it(source: Path, serve: NewServer, new_access: NewAccess) -> None:
    server = serve(source.parent, tries(99, "endless", "manifest"))
    with pytest.raises(UserError, match=r"manifest.json is not a manifest: it is larger than any manifest can be"):
        Manifest.load(new_access(timeout_seconds=60.0).folder(f"{server.url}/source"))
    assert server.sent["/source/manifest.json"] < 2 * (32 << 20)


def test_a_forbidden_file_is_told_at_once(source: Path, serve: NewServer, new_access: NewAccess) -> None:
    server = serve(source.parent, tries(99, "403", "."))
    with pytest.raises(UserError, match=r"manifest.json: the server does not let it be read \(HTTP 403\)"):
        Manifest.load(new_access().folder(f"{server.url}/source"))
    assert len(server.requests) == 1


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named_with_the_command(
    scheme: str, package: str, new_access: NewAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{scheme}:// needs the package {package}: pip install {package}"):
        Manifest.load(new_access().folder(f"{scheme}://bucket/x"))


def test_the_environment_of_other_openers_does_not_matter(
    source: Path, tmp_path: Path, serve: NewServer, new_access: NewAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, mark = serve(source.parent), tmp_path / "ran"
    for name in ("GOPEN_HTTP", "GOPEN_HTTPS", "GOPEN_S3", "GOPEN_PIPE"):
        monkeypatch.setenv(name, f"touch {mark}; cat {{url}}")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setenv("WDS_VERBOSE_CACHE", "1")
    tokens = Stream([new_access().folder(f"{server.url}/source")], 16, seed=1).read(np.arange(20))
    assert np.array_equal(tokens, Stream([source], 16, seed=1).read(np.arange(20)))
    assert not mark.exists() and not (tmp_path / "theirs").exists()
