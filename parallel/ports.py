"""A free port for the ranks of one machine to meet at. Imports no torch."""

from __future__ import annotations

import random
import socket

# Below the ports that systems give to outgoing connections (Linux from 32768 on): between the moment when a port is found
# free and the moment when rank 0, which has torch to import, listens on it, such a connection would take it.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    """Raises OSError where every port tried is taken."""
    for port in random.SystemRandom().sample(PORTS, 50):
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {PORTS.start} and {PORTS.stop}")
