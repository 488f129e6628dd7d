"""A port that is free, and that no outgoing connection will have taken a moment later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from parallel import ports

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_the_port_can_be_listened_on_and_is_none_of_outgoing_connections() -> None:
    port = ports.free_port()
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
    if RANGE.exists():
        assert port < int(RANGE.read_text().split()[0])


def test_taken_ports_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        taken = server.getsockname()[1]
        monkeypatch.setattr(ports, "PORTS", range(taken, taken + 50))
        assert taken < ports.free_port() < taken + 50
