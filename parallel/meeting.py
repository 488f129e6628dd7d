"""The ranks meet at a store before they open a process group, so that a meeting that fails can say why.

Each writes into the store, under its number, what the others must know to reach it. Who waits in vain for another tells
which ranks have not come. What would make the process group itself hang is told instead of that: a host whose own name leads
to its loopback, a port that another host does not reach, ranks with other kinds of devices. torch's own rendezvous knows only
that somebody is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

POLL = 0.05  # seconds
CONNECT = 5.0  # seconds in which another host's port must answer
NEIGHBOURS = 16  # hosts that each host tries to reach, of many
PICK = "GLOO_SOCKET_IFNAME"  # by which a user names the interface, whatever the host's own name leads to
SIOCGIFADDR = 0x8915


class NotMet(dist.DistError):
    """The message says who is missing, or what keeps the ranks apart."""


class Arrival(NamedTuple):
    """What a rank tells of itself."""

    rank: int
    host: str
    address: str  # that its host's own name leads to, or of the interface that was named; empty if there is none
    picked: bool  # the interface was named
    port: int  # of the host's first rank, where it listens for those of other hosts; 0 elsewhere
    device: str  # cuda or cpu


def meet(rank: int, world: int, device: str, timeout: float) -> dist.Store:
    """The store of all ranks, at MASTER_ADDR and MASTER_PORT; rank 0 serves it (under torchrun its agent). Raises NotMet,
    on every rank that has come, where after `timeout` seconds some have not, or where they cannot reach each other."""
    deadline = time.monotonic() + timeout
    store = _store(rank, deadline)
    meeting = _Meeting(dist.PrefixStore("meeting", store), rank, world)
    with _listening(world) as port:
        ours = Arrival(rank, platform.node(), _address(), PICK in os.environ, port, device)
        arrivals = [Arrival(*told) for told in meeting.exchange("come", ours, deadline, _missing(timeout))]
        problem = apart(arrivals)
        if not problem and len({arrival.host for arrival in arrivals}) > 1:
            failed = [*unreached(ours, arrivals)] if port else []
            everyone = meeting.exchange("reached", failed, deadline + NEIGHBOURS * CONNECT, _silent)
            problem = "; ".join(line for lines in everyone for line in lines)
    if problem:
        raise NotMet(problem)
    return store


def _store(rank: int, deadline: float) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _await_server(host, port, deadline)
    limit = timedelta(seconds=max(deadline - time.monotonic(), 1.0))
    try:
        return dist.TCPStore(host, port, None, serves, limit, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        problem = f"cannot serve the ranks at port {port}: it is taken" if serves else "has lost the store of the ranks"
        raise NotMet(f"{platform.node()} {problem}") from error


def _await_server(host: str, port: int, deadline: float) -> None:
    """Until there is one: the ranks' hosts start, and their names become known, one after the other. torch would wait as
    well, but tells of its end in stacks of C++."""
    started = time.monotonic()
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), min(max(left, POLL), CONNECT)).close()
            return
        except OSError as error:
            if left <= 0:
                waited = f"for {time.monotonic() - started:.0f} s"
                if isinstance(error, socket.gaierror):
                    problem = f"does not know the name {host} (MASTER_ADDR), {waited}: {error.strerror}"
                else:
                    problem = f"has found nobody at {host}, port {port}, {waited}: rank 0 has not come, or a firewall"
                raise NotMet(f"{platform.node()} {problem}") from error
        time.sleep(POLL)


class _Meeting(NamedTuple):
    """What the ranks tell each other at the store."""

    store: dist.Store
    rank: int
    world: int

    def exchange(self, what: str, ours: Any, deadline: float, late: Callable[[dict[int, Any], int], str]) -> list[Any]:
        """What all ranks told; `late`: the message for those that some have told, of so many."""
        keys = [f"{what}-{number}" for number in range(self.world)]
        self.store.set(keys[self.rank], json.dumps(ours))
        if self.store.add(f"{what}-count", 1) == self.world:
            self.store.set(f"{what}-by-all", "")
        try:  # on one key: thousands of ranks that ask for thousands would keep the store from answering
            self.store.wait([f"{what}-by-all"], timedelta(seconds=max(deadline - time.monotonic(), POLL)))
        except dist.DistStoreError as error:
            there = {number: key for number, key in enumerate(keys) if self.store.check([key])}
            told = {number: json.loads(self.store.get(key)) for number, key in there.items()}
            raise NotMet(late(told, self.world)) from error
        return [json.loads(value) for value in self.store.multi_get(keys)]


def _missing(timeout: float) -> Callable[[dict[int, Any], int], str]:
    def words(told: dict[int, Any], world: int) -> str:
        hosts = ", ".join(sorted({Arrival(*arrival).host for arrival in told.values()}))
        return f"{_ranks(told, world)} not come within {timeout:g} s; here are those of {hosts}"

    return words


def _silent(told: dict[int, Any], world: int) -> str:
    return f"{_ranks(told, world)} come, but not said whom it reaches"


def _ranks(told: dict[int, Any], world: int) -> str:
    """`rank 3 of 4 has`: those that have not told."""
    ranks = [rank for rank in range(world) if rank not in told]
    names = ", ".join(map(str, ranks[:20])) + (f" and {len(ranks) - 20} more" if len(ranks) > 20 else "")
    return f"ranks {names} of {world} have" if len(ranks) > 1 else f"rank {names} of {world} has"


# -- who reaches whom ------------------------------------------------------------------------------------------------


def apart(arrivals: Sequence[Arrival]) -> str:
    """What keeps ranks that have met from opening a process group, in words; empty if nothing is known to."""
    devices = Counter(arrival.device for arrival in arrivals)
    if len(devices) > 1:
        [(most, _), *fewer] = devices.most_common()
        return "; ".join(f"{_holders(arrivals, few)} would compute on {few}, the others on {most}" for few, _ in fewer)
    if len({arrival.host for arrival in arrivals}) == 1:
        return ""
    local = sorted({a.host for a in arrivals if not a.picked and (a.address.startswith("127.") or a.address == "::1")})
    if local:
        return (
            f"{', '.join(local)}: the host's own name leads to its loopback, where no other host reaches it; mend its "
            f"/etc/hosts, or name the interface by {PICK}"
        )
    return ""


def _holders(arrivals: Sequence[Arrival], device: str) -> str:
    ranks: dict[str, list[str]] = {}
    for arrival in arrivals:
        if arrival.device == device:
            ranks.setdefault(arrival.host, []).append(str(arrival.rank))
    return "; ".join(f"{host} (rank{'s' if len(held) > 1 else ''} {', '.join(held)})" for host, held in ranks.items())


def unreached(ours: Arrival, arrivals: Sequence[Arrival]) -> Iterator[str]:
    """Of the hosts behind ours in order, those whose port does not answer, in words."""
    others = [arrival for arrival in arrivals if arrival.port and arrival.host != ours.host]
    behind = sorted(others, key=lambda arrival: (arrival.rank < ours.rank, arrival.rank))
    for other in behind[:NEIGHBOURS]:
        try:
            socket.create_connection((other.address or other.host, other.port), CONNECT).close()
        except OSError as error:
            why = error.strerror or str(error)
            yield f"{ours.host} does not reach {other.host} ({other.address}, port {other.port}): {why}"


@contextlib.contextmanager
def _listening(world: int) -> Iterator[int]:
    """A port at which other hosts find this one while they meet, on its first rank, where there are several hosts."""
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world
    if alone or os.environ.get("LOCAL_RANK") != "0":
        yield 0
        return
    with socket.create_server(("", 0), backlog=4 * NEIGHBOURS) as server:
        yield server.getsockname()[1]


def _address() -> str:
    if name := os.environ.get(PICK):
        return _of_interface(name)
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(platform.node(), None, type=socket.SOCK_STREAM)[0][4][0])
    return ""


def _of_interface(name: str) -> str:
    """Its IPv4 address; only Linux tells."""
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        found = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(found[20:24])
    return ""
