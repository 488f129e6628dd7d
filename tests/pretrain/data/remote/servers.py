"""Real web servers on ports of this machine, with the faults that servers and networks have."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple


class Request(NamedTuple):
    path: str
    start: int
    size: int  # bytes asked for; -1: all


Fault = Callable[[Request, int], str]  # (request, how many were made before for the same) -> a name below, or ""


class Files(ThreadingHTTPServer):
    """Files of a folder, in ranges. `fault` decides what goes wrong: "500", "404", "403", "short" (the answer says that it is
    shorter), "wrong" (a byte is another), "cut" (the connection ends early), "hang" (no answer), "whole" (no ranges),
    "endless" (more than asked for), "to URL" (a redirect), "after SECONDS"."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, fault: Fault = lambda request, before: "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fault = folder, fault
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()  # bytes of each file
        self.at_once = self.most_at_once = 0
        self.lock, self.over = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked_for(self, pattern: str) -> list[Request]:
        """Requests whose path has the pattern."""
        with self.lock:
            return [request for request in self.requests if re.search(pattern, request.path)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Files

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, size = (int(found[1]), int(found[2]) + 1 - int(found[1])) if found else (0, -1)
        request, server = Request(self.path, start, size), self.server
        with server.lock:
            before = server.requests.count(request)
            server.requests.append(request)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self._answer(request, server.fault(request, before))
        finally:
            with server.lock:
                server.at_once -= 1

    def _answer(self, request: Request, fault: str) -> None:
        if fault.startswith("after "):
            time.sleep(float(fault[6:]))
        if fault == "hang":
            self.server.over.wait(60)
            self.close_connection = True
            return
        if fault.isdigit() or fault.startswith("to "):
            self._head(int(fault) if fault.isdigit() else 302, 0, {} if fault.isdigit() else {"Location": fault[3:]})
            return
        path = self.server.folder / request.path.lstrip("/")
        if not path.is_file():
            self._head(404, 0)
            return
        with path.open("rb") as file:
            file.seek(0 if fault == "whole" else request.start)
            data = file.read() if fault == "whole" else file.read(request.size)
        if fault == "endless":
            self._endless(request.path)
            return
        if not data and request.start:
            self._head(416, 0)
            return
        self._send(request.path, data, fault, 200 if fault == "whole" or request.size < 0 else 206)

    def _send(self, path: str, data: bytes, fault: str, status: int) -> None:
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._head(status, len(data))
        sent = data[: len(data) // 2] if fault == "cut" else data
        self.wfile.write(sent)
        with self.server.lock:
            self.server.sent[path] += len(sent)
        self.close_connection = fault == "cut" or self.close_connection

    def _head(self, status: int, size: int, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def _endless(self, path: str) -> None:
        self.send_response(206)
        self.end_headers()  # no length: until the connection ends
        self.close_connection = True
        while not self.server.over.is_set():
            self.wfile.write(b"x" * 65536)
            with self.server.lock:
                self.server.sent[path] += 65536

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal."""


class Relay:
    """Passes connections on to another server, with faults: `fault` is told the number of a connection, from 0, and gives "cut"
    (it ends within the first answer), "500" (as the answer), "reset" (before any answer), "after SECONDS" or ""."""

    def __init__(self, url: str, fault: Callable[[int], str]) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.target, self.fault = (host, int(port)), fault
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed
                return
            fault, self.connections = self.fault(self.connections), self.connections + 1
            threading.Thread(target=self._relay, args=(client, fault), daemon=True).start()

    def _relay(self, client: socket.socket, fault: str) -> None:
        with client, contextlib.suppress(OSError):
            if fault == "reset":
                return
            if fault == "500":
                client.recv(65536)
                client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            if fault.startswith("after "):
                time.sleep(float(fault[6:]))
            with socket.create_connection(self.target) as server:
                threading.Thread(target=self._pass, args=(client, server, -1), daemon=True).start()
                self._pass(server, client, 900 if fault == "cut" else -1)

    def _pass(self, source: socket.socket, target: socket.socket, most: int) -> None:
        """Until the source ends or so many bytes have gone."""
        with contextlib.suppress(OSError):
            while most and (data := source.recv(65536 if most < 0 else most)):
                target.sendall(data)
                most -= len(data) if most > 0 else 0
            target.shutdown(socket.SHUT_WR)


@contextmanager
def serving(server: Files) -> Iterator[Files]:
    """The server while it answers."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def tries(count: int, fault: str, pattern: str = r"\.tar") -> Fault:
    """The fault at the first `count` requests for each range of a file whose name has the pattern."""
    return lambda request, before: fault if before < count and re.search(pattern, request.path) else ""
