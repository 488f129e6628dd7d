"""`python -m launch node`: this machine's ranks of a run on several machines, each of which runs the same command with
another --node-rank. The image's entry point is this; any other way to start a command on each machine does as well.

All ranks meet at the address of node rank 0. gloo, which carries what lies in the hosts' memory, would take the interface
that the machine's own name stands for: on many machines that is loopback (127.0.1.1 in /etc/hosts), where no other node
comes. So it is given the interface that leads to node rank 0, and so is NCCL.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from launch.local import environments_of, show
from launch.opening import add_run_options, open_config
from pretrain.config.profile import add_profile_option
from pretrain.errors import UserError

EXAMPLE = "python -m launch node configs/gpt/demo.yaml --processes 8 --nodes 2 --node-rank 0 --master node1:29500"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # a user's stay
NAME_SECONDS = 60.0  # until node rank 0 has a name: its container may start later than ours
SIOCGIFADDR = 0x8915


class Place(NamedTuple):
    """Of a machine among those of a run."""

    nodes: int
    rank: int
    address: str  # of node rank 0
    port: int


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """`commands`: what argparse's add_subparsers gave."""
    node: argparse.ArgumentParser = commands.add_parser(
        "node",
        help="this machine's share of a run on several",
        description="Train on processes of this machine that meet those of others, where the same command runs. Rank 0 "
        "writes here, the others to RUN/logs/rank-N.log. Ctrl-C on any saves and ends all; the same command goes on.",
        usage="python -m launch node CONFIG --processes N --nodes N --node-rank N --master ADDRESS:PORT [--dry-run] "
        "[--profile [N]] [section.key=value ...]",
        epilog=f"example: {EXAMPLE}",
    )
    add_run_options(node)
    node.add_argument("--processes", type=int, required=True, metavar="N", help="how many on each machine")
    node.add_argument("--nodes", type=int, default=1, metavar="N", help="how many machines (default: 1)")
    node.add_argument("--node-rank", type=int, default=0, metavar="N", help="which of them this is (default: 0)")
    node.add_argument(
        "--master", default="localhost:29500", metavar="ADDRESS:PORT", help="where the machine of node rank 0 listens"
    )
    add_profile_option(node)
    return node


def run(args: argparse.Namespace) -> int:
    """Check, start this machine's ranks and wait; returns the exit code of the rank that failed first, or 0.

    Raises UserError, before anything starts, for whatever can be known now.
    """
    place = place_of(args)
    config = open_config(args.config, args.overrides, args.processes * place.nodes)
    from launch.ranks import Ranks, say
    from parallel.layout import Layout

    options = [] if args.profile is None else [f"--profile={args.profile}"]
    command = [sys.executable, "-m", "pretrain", "train", args.config, *args.overrides, *options]
    environments = environments_at(place, args.processes)
    layout = Layout.of(config.parallel, args.processes * place.nodes)
    if args.dry_run:
        show(command, environments, layout)
        return 0
    if place.nodes > 1:
        interface = interfaces(place)
        environments = [{**interface, **environment} for environment in environments]
    say(f"node {place.rank} of {place.nodes}, {args.processes} processes each: {layout}; meeting at {args.master}")
    return Ranks(command, environments, Path(config.run.dir) / "logs").wait()


def place_of(args: argparse.Namespace) -> Place:
    address, _, port = args.master.rpartition(":")
    if args.processes < 1 or args.nodes < 1:
        raise UserError("--processes and --nodes: at least 1 of each")
    if not 0 <= args.node_rank < args.nodes:
        raise UserError(f"--node-rank: from 0 to {args.nodes - 1} on {args.nodes} nodes, not {args.node_rank}")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--master: ADDRESS:PORT, for instance node1:29500, not {args.master!r}")
    return Place(args.nodes, args.node_rank, address.strip("[]"), int(port))


def environments_at(place: Place, processes: int) -> list[dict[str, str]]:
    """The variables that torch.distributed reads, for each rank of this machine."""
    shared = {
        "WORLD_SIZE": str(place.nodes * processes),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
    }
    first = place.rank * processes
    ours = enumerate(environments_of(processes))
    return [{**environment, **shared, "RANK": str(first + local)} for local, environment in ours]


# -- the interface that leads to the others --------------------------------------------------------------------------


def interfaces(place: Place) -> dict[str, str]:
    """The variables that name it; none where the user set them, or where it cannot be told.

    Raises UserError where the address of node rank 0 has no meaning here, or is one that only this machine can reach.
    """
    missing = [name for name in INTERFACES if not os.environ.get(name)]
    if "GLOO_SOCKET_IFNAME" not in missing:
        return {}
    address = resolve(place.address, place.port, NAME_SECONDS)
    own = route_from(address, place.port)
    if own.startswith("127."):
        raise UserError(
            f"--master: {place.address} is {address} on node {place.rank} ({socket.gethostname()}), which no other machine "
            "reaches; give the address of node rank 0 on the network that the nodes share"
        )
    name = interface_of(own)
    return dict.fromkeys(missing, name) if name else {}


def resolve(name: str, port: int, seconds: float) -> str:
    """The IPv4 address, once there is one. Raises UserError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return str(socket.getaddrinfo(name, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--master: {name!r} has no address on {socket.gethostname()} ({error.strerror or error}); give a name "
                    "that every node knows, or an address"
                ) from error
        time.sleep(1.0)


def route_from(address: str, port: int) -> str:
    """This machine's own address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((address, port))
        except OSError as error:
            raise UserError(f"--master: no way from {socket.gethostname()} to {address}: {error.strerror}") from error
        return str(way.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The interface whose (first) address it is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
