"""Network namespaces as machines: each with an address and a name of its own, on a switch whose cables can be pulled."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Namespace:
    """A network of its own; `enter` goes before a command that is to run there."""

    name: str

    @property
    def enter(self) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}"]

    def ip(self, *words: str) -> None:
        ip("-n", self.name, *words)


@dataclass(frozen=True)
class Machine(Namespace):
    """One that is plugged into a switch."""

    host: str
    address: str
    hosts_file: Path  # stands for /etc/hosts there

    @property
    def enter(self) -> list[str]:
        # Its own host name, and its own idea of who has which address.
        inside = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        apart = ["unshare", "--uts", "--mount", "sh", "-c", inside, "sh", self.host, str(self.hosts_file)]
        return [*super().enter, *apart]

    def pull_the_cable(self) -> None:
        self.ip("link", "set", "e0", "down")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def namespace(word: str) -> Iterator[Namespace]:
    """One with loopback alone."""
    made = Namespace(f"pt{os.getpid()}{word}")
    ip("netns", "add", made.name)
    try:
        made.ip("link", "set", "lo", "up")
        yield made
    finally:
        ip("netns", "delete", made.name)


@contextlib.contextmanager
def machines(folder: Path, hosts: Sequence[str]) -> Iterator[list[Machine]]:
    """As many as there are names. Each one's own name is loopback in its /etc/hosts, as Debian writes it."""
    addresses = [f"198.18.9.{10 + number}" for number in range(len(hosts))]
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(namespace("s"))
        switch.ip("link", "add", "bridge", "type", "bridge")
        switch.ip("link", "set", "bridge", "up")
        made = []
        for number, (host, address) in enumerate(zip(hosts, addresses, strict=True)):
            own = stack.enter_context(namespace(str(number)))
            others = [f"{there} {name}" for name, there in zip(hosts, addresses, strict=True) if name != host]
            hosts_file = folder / f"hosts-{host}"
            hosts_file.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {host}", *others, ""]))
            ip("-n", own.name, "link", "add", "e0", "type", "veth", "peer", "name", f"p{number}", "netns", switch.name)
            switch.ip("link", "set", f"p{number}", "master", "bridge", "up")
            own.ip("address", "add", f"{address}/24", "dev", "e0")
            own.ip("link", "set", "e0", "up")
            made.append(Machine(own.name, host, address, hosts_file))
        yield made
