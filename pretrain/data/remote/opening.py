"""By whom an address is read: fsspec's file systems, each held to what the configuration allows.

Nothing here looks at a path's ending, runs a program, or reads GOPEN_*, WDS_* or a proxy's environment. Where a host may
be is decided when a socket is about to be opened, by the address that it will connect to: what a name resolved to before
does not matter.

    a name               may not lead to a private, loopback or link-local address, unless `allow_private` says so
    an address of digits may be private where the user typed it, or localhost, himself: then that address and port alone
    a redirect           keeps its scheme; it may not lead to a private address that was not typed, unless allowed
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

from pretrain.config.remote import RemoteConfig
from pretrain.data.remote.addresses import Address
from pretrain.errors import UserError

MOST_REDIRECTS = 5
PORTS = {"http": 80, "https": 443}
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
)  # of botocore, google.auth
Place = tuple[str, int]  # an address of digits, and a port


class PrivateAddress(OSError):
    """A connection that was not made. Its words are always the same, since those who try several addresses of one name
    join words that differ into others."""

    def __init__(self) -> None:
        super().__init__(None, "leads to a private address")


class Moved(Exception):
    """The server says that the file is elsewhere."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


class Opener:
    """Reads ranges of remote files, one try each. Safe for several threads at once."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._systems: dict[Any, Any] = {}

    def read(self, address: Address, start: int, size: int, seconds: float) -> bytes:
        """Bytes start : start + size, fewer where the file ends before.

        Raises UserError for what is not allowed, FileNotFoundError and PermissionError where the server says so,
        TimeoutError after `seconds`, and OSError for whatever else goes wrong.
        """
        try:
            if address.scheme in PORTS:
                return self._read_http(str(address), start, size, time.monotonic() + seconds)
            name = str(address).partition("://")[2]
            if address.scheme == "memory":
                system = self._system("memory", lambda: _file_system("memory"))
                return bytes(system.cat_file(f"/{name}", start=start, end=start + size))
            system = self._system(address.scheme, lambda: self._new_bucket_system(address.scheme))
            return _within(seconds, system, name, start, start + size)
        except UserError:
            raise
        except Exception as error:  # each library has errors of its own: what they mean is that this try failed
            raise _explained(error, address) from error

    def _read_http(self, url: str, start: int, size: int, deadline: float) -> bytes:
        typed, first = typed_places(url), url
        for _ in range(MOST_REDIRECTS + 1):
            host = urlsplit(url).hostname or ""
            system = self._http_system(None if self._trusts(host) else typed)
            try:
                return _within(max(deadline - time.monotonic(), 0.001), system, url, start, start + size)
            except PrivateAddress as error:
                way = "" if url == first else f" redirects to {url!r:.200}, which"
                raise UserError(
                    f"{first}:{way} leads to a private address, where this is not to be looked for; if it is meant, set "
                    f"data.remote.allow_private: [{host}]."
                ) from error
            except Moved as moved:
                url = self._redirected(first, urljoin(url, moved.location))
        raise UserError(f"{first}: redirects more than {MOST_REDIRECTS} times; name the address where it ends.")

    def _redirected(self, first: str, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme != urlsplit(first).scheme:
            raise UserError(
                f"{first}: redirects to another scheme, {url!r:.200}; name that address itself if it is meant."
            )
        if "@" in parts.netloc or not parts.hostname:
            raise UserError(f"{first}: redirects to {url!r:.200}, which is no plain address.")
        return url

    def _trusts(self, host: str) -> bool:
        allowed = self.config.allow_private
        return allowed if isinstance(allowed, bool) else host in allowed

    def _http_system(self, allowed: frozenset[Place] | None) -> Any:
        """One that connects to public addresses and those allowed; None: to any."""
        from pretrain.data.remote.http import HttpFiles

        def make() -> Any:
            return HttpFiles(None if allowed is None else guard(allowed), self.config.in_flight)

        return self._system(("http", allowed), make)

    def _new_bucket_system(self, scheme: str) -> Any:
        from pretrain.data.remote import buckets

        endpoint = self.config.endpoint if scheme == "s3" else None
        typed = frozenset[Place]() if endpoint is None else typed_places(endpoint)
        host = "" if endpoint is None else urlsplit(endpoint).hostname or ""
        new_socket = None if self._trusts(host) else guard(typed)
        return buckets.s3(self.config, new_socket) if scheme == "s3" else buckets.gcs(self.config, new_socket)

    def _system(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._systems:
                self._systems[key] = make()
            return self._systems[key]


def typed_places(url: str) -> frozenset[Place]:
    """What may be connected to because the user typed it: an address of digits, or localhost, with its port."""
    parts = urlsplit(url)
    host, port = (parts.hostname or "").rstrip("."), parts.port or PORTS[parts.scheme]
    if host == "localhost":
        return frozenset({("127.0.0.1", port), ("::1", port)})
    try:
        return frozenset({(str(ipaddress.ip_address(host)), port)})
    except ValueError:
        return frozenset()


def guard(allowed: frozenset[Place]) -> Callable[[Any], socket.socket]:
    """Makes the socket for a connection that is about to be opened, as aiohttp asks for it (getaddrinfo's tuple), or
    raises PrivateAddress."""

    def new_socket(info: Any) -> socket.socket:
        family, kind, protocol, _, place = info
        if (place[0], place[1]) not in allowed and not is_public(place[0]):
            raise PrivateAddress
        return socket.socket(family, kind, protocol)

    return new_socket


def is_public(text: str) -> bool:
    """Whether an address of digits belongs to the internet; of an IPv6 one that stands for an IPv4 one, that one does."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in ipaddress.ip_network("64:ff9b::/96"):  # a translator's
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return address.is_global and not address.is_multicast


def _within(seconds: float, system: Any, path: str, start: int, end: int) -> bytes:
    """A read by an asynchronous file system. Raises TimeoutError when the time is over."""
    from fsspec.asyn import sync
    from fsspec.exceptions import FSTimeoutError

    try:
        return bytes(sync(system.loop, system._cat_file, path, start=start, end=end, timeout=seconds))
    except FSTimeoutError as error:
        raise TimeoutError from error


def _file_system(name: str) -> Any:
    import fsspec

    return fsspec.filesystem(name)


def _explained(error: Exception, address: Address) -> Exception:
    """What a library's error means here: a UserError where a further try would only say so again, else an OSError."""
    if isinstance(error, ImportError):
        return _missing(address)
    if type(error).__name__ in NO_CREDENTIALS:
        return UserError(
            f"{address}: there are no credentials for it; set them up as for the store's own tools, or for a public bucket "
            "data.remote.anonymous: true."
        )
    if _is_private(error):
        return UserError(
            f"{address}: its server leads to a private address, where this is not to be looked for; if it is meant, set "
            "data.remote.allow_private: true."
        )
    return error if isinstance(error, OSError) else OSError(None, f"{type(error).__name__}: {error}")


def _is_private(error: BaseException | None) -> bool:
    """Whether the guard is behind it."""
    if error is None or isinstance(error, PrivateAddress):
        return error is not None
    return _is_private(getattr(error, "os_error", None)) or _is_private(error.__cause__ or error.__context__)


def _missing(address: Address) -> UserError:
    package = PACKAGES.get(address.scheme, "fsspec")
    return UserError(f"{address}: reading from {address.scheme}:// needs the package {package}: pip install {package}")
