"""`python -m launch node`, one machine's share of a run, and docker/entrypoint.sh, which is it in a container."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from launch import node
from launch.__main__ import parse
from launch.ranks import SIGNALS, Ranks
from pretrain.errors import Exit, UserError
from tests.distributed import REPOSITORY
from tests.launch.test_local import CONFIG

ENTRYPOINT = REPOSITORY / "docker" / "entrypoint.sh"


def arguments(*words: str) -> Namespace:
    return parse(["node", CONFIG, *words])


# -- the command -----------------------------------------------------------------------------------------------------


def test_ranks_are_counted_over_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    place = node.place_of(arguments("--processes", "2", "--nodes", "3", "--node-rank", "1", "--master", "a.b:2000"))
    environments = node.environments_at(place, 2)
    assert [(each["RANK"], each["LOCAL_RANK"]) for each in environments] == [("2", "0"), ("3", "1")]
    for each in environments:
        assert (each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"]) == ("6", "2")
        assert (each["MASTER_ADDR"], each["MASTER_PORT"]) == ("a.b", "2000")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "0"], "at least 1"),
        (["--processes", "1", "--nodes", "2", "--node-rank", "2"], "--node-rank: from 0 to 1 on 2 nodes, not 2"),
        (["--processes", "1", "--master", "node1"], "ADDRESS:PORT"),
        (["--processes", "1", "--master", "node1:99999"], "ADDRESS:PORT"),
    ],
)
def test_places_that_cannot_be_are_told(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        node.place_of(arguments(*words))


@pytest.mark.parametrize("code", [0, 7, Exit.STOPPED])
def test_ranks_of_another_machine_write_to_their_own_logs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    """And the last words of one that failed are told here: rank 0, which would tell, is elsewhere."""
    script = f"import os; print('I am', os.environ['RANK']); raise SystemExit({code})"
    environments = node.environments_at(node.Place(2, 1, "node-0", 2000), 2)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert Ranks([sys.executable, "-c", script], environments, tmp_path).wait() == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "rank-2.log": "I am 2\n",
        "rank-3.log": "I am 3\n",
    }
    told = capfd.readouterr()
    assert told.out == "" and ("ended with exit code 7" in told.err) == ("exit code" in told.err) == (code == 7)


# -- the interface ---------------------------------------------------------------------------------------------------


def own_address() -> str:
    """Of an interface of this machine that is not loopback; loopback's where there is no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect(("203.0.113.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(way.getsockname()[0])


def test_the_interface_is_the_one_that_leads_to_node_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in node.INTERFACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(node, "route_from", lambda address, port: {"10.9.9.9": own_address()}[address])
    found = node.interfaces(node.Place(2, 1, "10.9.9.9", 2000))
    assert set(found) == set(node.INTERFACES) and len(set(found.values())) == 1
    assert next(iter(found.values())) in [name for _, name in socket.if_nameindex()]
    assert node.interface_of("127.0.0.1") == "lo"


def test_a_users_interface_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert node.interfaces(node.Place(2, 0, "127.0.0.1", 2000)) == {}


def test_an_address_that_only_this_machine_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(
        UserError, match=r"--master: localhost is 127\.0\.0\.1 on node 1 .* which no other machine reaches"
    ):
        node.interfaces(node.Place(2, 1, "localhost", 2000))


def test_a_name_without_an_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(UserError, match=r"'node1' has no address .*Name or service not known"):
        node.resolve("node1", 2000, seconds=-1)


# -- the entry point -------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with a `python` that writes its arguments as JSON."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tell = '#!/usr/bin/env bash\nprintf "%s\\0" "$@" > "$TOLD"; [ -z "$WAIT" ] || exec sleep 60\n'
    (folder / "python").write_text(tell)
    (folder / "python").chmod(0o755)
    return folder


def enter(programs: Path, words: list[str], **variables: str) -> list[str]:
    """What the entry point had python run."""
    told = programs / "told"
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "TOLD": str(told), "WAIT": "", **variables}
    subprocess.run(["bash", ENTRYPOINT, *words], env=environment, check=True, timeout=30)
    return told.read_bytes().decode().split("\0")[:-1]


def test_the_entry_point_starts_this_containers_ranks(programs: Path) -> None:
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "2000", "PROCESSES": "4"}
    hostile = "run.dir=a b'\"$(touch pwned)\n;*"
    told = enter(programs, ["train", CONFIG, hostile], **place)
    assert told[:2] == ["-m", "launch"]
    args = parse(told[2:])
    assert (args.config, args.overrides) == (CONFIG, [hostile])
    assert node.place_of(args) == node.Place(2, 1, "node-0", 2000) and args.processes == 4


def test_the_entry_point_counts_gpus(programs: Path) -> None:
    assert parse(enter(programs, ["train", CONFIG])[2:]).processes == 1
    smi = programs / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: x)'; echo 'GPU 1: H100 (UUID: y)'\n")
    smi.chmod(0o755)
    assert parse(enter(programs, ["train", CONFIG])[2:]).processes == 2
    smi.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert parse(enter(programs, ["train", CONFIG])[2:]).processes == 1


def test_the_entry_point_runs_any_other_command(programs: Path) -> None:
    assert enter(programs, ["python", "-m", "pretrain", "a b"]) == ["-m", "pretrain", "a b"]


def test_a_signal_reaches_what_the_entry_point_started(programs: Path) -> None:
    told = programs / "told"
    environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "TOLD": str(told), "WAIT": "1"}
    with subprocess.Popen(["bash", ENTRYPOINT, "train", CONFIG], env=environment) as process:
        while "sleep" not in Path(f"/proc/{process.pid}/cmdline").read_text():
            assert process.poll() is None
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM
