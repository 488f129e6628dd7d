"""fsspec's HTTP file system, with what it leaves open closed: redirects come to the caller, an answer is never longer than
what was asked for, nothing is unpacked, and sockets are made by a guard."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

from pretrain.data.remote.opening import Moved, PrivateAddress
from pretrain.errors import UserError

REDIRECTS = (301, 302, 303, 307, 308)
NO_FILE, NO_ENTRY, NO_SUCH_RANGE = (404, 410), (401, 403), 416
CONNECT_SECONDS = 20.0  # of the time that a try has
BUFFER = 1 << 20


class HttpFiles(HTTPFileSystem):  # type: ignore[misc]
    """Ranges of files on web servers."""

    def __init__(self, new_socket: Callable[[Any], Any] | None, connections: int) -> None:
        async def client(loop: Any) -> aiohttp.ClientSession:
            return aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=2 * connections, socket_factory=new_socket),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                read_bufsize=BUFFER,
            )

        super().__init__(get_client=client, skip_instance_cache=True)

    async def _cat_file(self, url: str, start: int, end: int) -> bytes:  # type: ignore[override]
        """Bytes start : end, fewer where the file ends before. Raises Moved, UserError, OSError."""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        session = await self.set_session()
        try:
            async with session.get(url, headers=headers, allow_redirects=False) as answer:
                return await _content(answer, url, start, end - start)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, PrivateAddress):
                raise error.os_error from error
            raise
        except aiohttp.ClientPayloadError as error:
            raise OSError(None, "the connection was cut") from error


async def _content(answer: aiohttp.ClientResponse, url: str, start: int, size: int) -> bytes:
    status = answer.status
    if status in REDIRECTS:
        raise Moved(answer.headers.get("Location", ""))
    if status in NO_FILE:
        raise FileNotFoundError(errno.ENOENT, f"there is no such file (HTTP {status})")
    if status in NO_ENTRY:
        raise PermissionError(errno.EACCES, f"the server does not let it be read (HTTP {status})")
    if status == NO_SUCH_RANGE:
        return b""
    if status == 200 and start:
        raise UserError(f"{url}: its server does not answer ranges of a file; one that does is needed, such as nginx.")
    if status not in (200, 206):
        raise OSError(None, f"the server answered HTTP {status}")
    if (length := answer.content_length) is not None and length <= size:
        return await answer.read()
    data = bytearray()
    while len(data) < size and (piece := await answer.content.read(size - len(data))):
        data += piece
    return bytes(data)
