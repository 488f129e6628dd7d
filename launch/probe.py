"""What only a container on its host can tell, just before a run: `python -m launch.probe`, started by launch/hosts.py with
the options that the run's container will have. Writes one line: `launch: probe {"problems": [...], "unreached": "..."}`.

Node rank 0 listens on the run's port until all others have come. It leaves a file in the run's folder that they look for:
every rank writes its part of a checkpoint there, so it has to be one folder. Imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

MEET_SECONDS = 20.0  # containers do not start at the same moment
HERE, NO_FILE = b"here\n", b"no file\n"  # node rank 0's answers to the token
LOOK_SECONDS = 5.0  # a network file system may keep a folder's old contents for some seconds
FREE_BYTES = 2**30  # below which no run of any size gets far; the trainer knows what its checkpoints need


def main() -> None:
    args = _arguments()
    problems = [*gpu_problems(args.gpus), *folder_problems(args.folder)]
    unreached = ""
    if args.nodes > 1 and args.node_rank == 0:
        problems += [*address_problems(args.address), *listen(args)]
    elif args.nodes > 1:
        connection, unreached = reach(args.address, args.port, args.token)
        if connection is not None:
            with connection:
                problems = problems or shared_problems(args.folder / marker(args.token), args.address)
    print("launch: probe", json.dumps({"problems": problems, "unreached": unreached}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.probe", description=__doc__)
    for name in ("--nodes", "--node-rank", "--port", "--gpus"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--address", required=True, help="of node rank 0")
    parser.add_argument("--folder", type=Path, required=True, help="of the run")
    parser.add_argument("--token", required=True, help="the same on all nodes, and on no other run's")
    return parser.parse_args()


def marker(token: str) -> str:
    return f"logs/.meeting-{token}"


# -- this host -------------------------------------------------------------------------------------------------------


def gpu_problems(wanted: int) -> list[str]:
    if wanted == 0:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=15, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"the container has no working nvidia-smi ({error}); is the NVIDIA Container Toolkit installed?"]
    found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    if found == wanted:
        return []
    said = (listed.stdout + listed.stderr).strip().splitlines()
    return [
        f"{found} GPUs answer where {wanted} are wanted" + (f" (nvidia-smi: {said[-1]})" if not found and said else "")
    ]


def folder_problems(folder: Path) -> list[str]:
    """The run's folder can be written, and has room."""
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        mine = folder / "logs" / f".writing-{os.getpid()}-{socket.gethostname()}"
        mine.touch()
        mine.unlink()
    except OSError as error:
        who = f"{os.getuid()}:{os.getgid()}"
        return [
            f"user {who} cannot write {folder}: {error.strerror}; `mkdir -p {folder} && chown {who} {folder}` there, or --user"
        ]
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        return [f"only {free / 2**20:,.0f} MiB are free in {folder}; make room, or choose another run.dir"]
    return []


def address_problems(address: str) -> list[str]:
    """Node rank 0's address must not be loopback on its own machine, or what its ranks listen on is."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return []
    try:
        here = socket.gethostbyname(address)
    except OSError as error:
        return [f"{address!r} has no address there ({error.strerror}); give one that all hosts know with --master"]
    if here.startswith("127."):
        return [
            f"{address} means {here} on that host itself, where no other comes; give its address on the network "
            "with --master"
        ]
    return []


# -- between hosts ---------------------------------------------------------------------------------------------------


def listen(args: argparse.Namespace) -> list[str]:
    """Meet every other node on the run's port; whom we miss, they tell."""
    try:
        server = socket.create_server(("", args.port))
    except OSError as error:
        why = os.strerror(error.errno or 0)
        return [f"port {args.port} cannot be listened on ({why}); choose another with --port"]
    mark = args.folder / marker(args.token)
    with suppress(OSError):  # told by folder_problems
        mark.touch()
    met: list[threading.Thread] = []
    deadline = time.monotonic() + MEET_SECONDS
    with server, suppress(TimeoutError):
        while len(met) < args.nodes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            connection, _ = server.accept()
            if _is_ours(connection, args.token, HERE if mark.exists() else NO_FILE):
                met.append(threading.Thread(target=_wait, args=(connection,)))
                met[-1].start()
    for thread in met:
        thread.join()
    mark.unlink(missing_ok=True)
    return []


def _is_ours(connection: socket.socket, token: str, answer: bytes) -> bool:
    connection.settimeout(1.0)
    with suppress(OSError):
        if connection.recv(64).decode(errors="replace").strip() == token:
            connection.sendall(answer)
            return True
    connection.close()
    return False


def _wait(connection: socket.socket) -> None:
    """Until the other node has looked for our file, and closes."""
    with connection, suppress(OSError):
        connection.settimeout(2 * LOOK_SECONDS)
        connection.recv(64)


def reach(address: str, port: int, token: str) -> tuple[socket.socket | None, str]:
    """The connection to node rank 0 on the run's port, if there is a file to look for, or why it is not reached."""
    deadline = time.monotonic() + MEET_SECONDS
    said = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((address, port), timeout=left)
            connection.sendall(f"{token}\n".encode())
            answer = connection.recv(64)
            if answer == HERE:
                return connection, ""
            connection.close()
            if answer == NO_FILE:
                return None, ""
            said = "another program answers"
        except socket.gaierror as error:
            return (
                None,
                f"{address!r} has no address there ({error.strerror}); give one that all hosts know with --master",
            )
        except OSError as error:
            said = error.strerror or str(error)
        time.sleep(0.3)
    mend = "let the hosts' firewalls pass what they send each other, or give another address with --master"
    return None, f"{address}:{port} is not reached from there ({said}); {mend}"


def shared_problems(mark: Path, address: str) -> list[str]:
    deadline = time.monotonic() + LOOK_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            return [
                f"{mark.parent.parent} there is not the folder that it is on {address}; run.dir has to lie on a file system "
                "that all hosts share"
            ]
        os.listdir(mark.parent)  # has NFS look again
        time.sleep(0.2)
    return []


if __name__ == "__main__":
    main()
