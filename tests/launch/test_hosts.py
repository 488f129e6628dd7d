"""What the checks of hosts conclude from what hosts say, and what the checking container finds out."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest

from launch import hosts, probe, ssh
from launch.hosts import Subject
from parallel.ports import free_port
from pretrain.errors import UserError

NOW = 1_800_000_000.0


def says(
    clock: float = 0.0,
    image: str = "sha256:1",
    problems: tuple[str, ...] = (),
    unreached: str = "",
    code: int = 0,
    errors: str = "",
    late: float = 0.0,
    begun: float = 0.4,
) -> ssh.Answer:
    """A host's answer: its clock is so many seconds ahead of ours; ssh took some to begin, and its word came so late."""
    told = json.dumps({"problems": problems, "unreached": unreached})
    lines = ["Welcome!", f"launch: clock {NOW + begun + clock:.9f}", "launch: engine 20.10.24", "launch: leftover "]
    lines += [f"launch: image {image}", f"launch: probe {told}"]
    return ssh.Answer(code, NOW, [(NOW + begun + late, line) for line in lines], errors)


def problems_of(monkeypatch: pytest.MonkeyPatch, **answers: ssh.Answer) -> list[str]:
    """The lines of the message for hosts that answer so; none where all may train."""
    monkeypatch.setattr(ssh, "ask", lambda host, script, seconds: answers[host])
    try:
        hosts.check([Subject(host, f"run-{host}", "engine", ["/data"], "true") for host in answers])
    except UserError as error:
        return str(error).splitlines()
    return []


def test_hosts_that_can_train_are_not_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of(monkeypatch, a=says(0.3), b=says(-0.5), c=says(late=9.0)) == []
    # Our own clock may be the wrong one, but not theirs when they agree.
    assert problems_of(monkeypatch, a=says(50.2), b=says(50.0), c=says(50.1)) == []


@pytest.mark.parametrize(("ahead", "way"), [(3.0, "ahead of"), (-90.0, "behind")])
def test_a_clock_that_is_off_is_named(monkeypatch: pytest.MonkeyPatch, ahead: float, way: str) -> None:
    for others in ({"a": says()}, {"a": says(), "c": says()}):
        summary, line, advice = problems_of(monkeypatch, **others, b=says(ahead))
        seconds = re.fullmatch(rf"  b: its clock is ([0-9.]+) s {way} the others'; set it by NTP \(.*\)", line)
        assert seconds and float(seconds[1]) == pytest.approx(abs(ahead), abs=0.6), line
        assert advice.endswith("--exclude b") and f"1 of {len(others) + 1} hosts" in summary


def test_a_slow_answer_makes_no_clock_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of(monkeypatch, a=says(), b=says(late=20.0), c=says(begun=20.0)) == []


def test_the_host_with_another_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    other = says(image="sha256:2")
    assert problems_of(monkeypatch, a=other, b=says(), c=says())[1].startswith("  a: engine is another image")
    assert problems_of(monkeypatch, a=says(), b=other)[1].startswith("  b: engine is another image")


def test_who_does_not_reach_node_rank_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = says(unreached="a:2000 is not reached")
    lines = problems_of(monkeypatch, a=says(), b=cut, c=says())
    assert lines[1:] == ["  b: a:2000 is not reached", "Mend it, or leave it out: --exclude b"]
    # Nobody reaches it: it is to blame.
    lines = problems_of(monkeypatch, a=says(), b=cut, c=cut)
    assert lines[1:] == [
        "  a: no other host reaches it: a:2000 is not reached",
        "Mend it, or leave it out: --exclude a",
    ]
    # It has a fault of its own: the others' is its consequence.
    lines = problems_of(monkeypatch, a=says(problems=("port 2000 is taken",)), b=cut, c=cut)
    assert lines[1:] == ["  a: port 2000 is taken", "Mend it, or leave it out: --exclude a"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            ssh.Answer(255, NOW, [], "b: Permission denied (publickey).\n"),
            "ssh: b: Permission denied (publickey).; let `ssh b",
        ),
        (ssh.Answer(255, NOW, [], ""), "ssh: no answer"),
        (ssh.Answer(-9, NOW, [(NOW, f"launch: clock {NOW}")], ""), "did not answer within 55 s"),
        (ssh.Answer(0, NOW, [(NOW, "launch: engine none")], ""), "docker is not installed there"),
        (ssh.Answer(-9, NOW, [(NOW, "launch: engine 20"), (NOW, "launch: image x")], ""), "did not end within 55 s"),
        (
            ssh.Answer(1, NOW, [(NOW, "launch: engine 20"), (NOW, "launch: missing 0")], ""),
            "/data is not there; share or copy",
        ),
        (
            ssh.Answer(125, NOW, [(NOW, "launch: engine 20"), (NOW, "launch: image x")], "oh"),
            "a container does not start: oh",
        ),
    ],
)
def test_each_way_not_to_answer_is_told(monkeypatch: pytest.MonkeyPatch, answer: ssh.Answer, said: str) -> None:
    lines = problems_of(monkeypatch, a=says(), b=answer)
    assert lines[1].startswith("  b: ") and said in lines[1] and lines[-1].endswith("--exclude b"), lines


# -- the checking container ------------------------------------------------------------------------------------------


def place(folder: Path, port: int, nodes: int = 2, token: str = "token") -> Namespace:
    return Namespace(folder=folder, port=port, nodes=nodes, token=token)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(probe, "MEET_SECONDS", 2.0)
    monkeypatch.setattr(probe, "LOOK_SECONDS", 0.5)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return tmp_path / "run"


def meet(folder: Path, others: list[Path], token: str = "token") -> list[str]:
    """What nodes that see these folders find, when they meet node rank 0, which sees `folder`."""
    port = free_port()
    first = threading.Thread(target=probe.listen, args=(place(folder, port, len(others) + 1),))
    first.start()
    found = []
    for other in others:
        connection, unreached = probe.reach("127.0.0.1", port, token)
        if connection is not None:
            with connection:
                found += probe.shared_problems(other / probe.marker("token"), "node-0")
        found += [unreached] if unreached else []
    first.join()
    assert not list(folder.rglob(".meeting*"))
    return found


def test_nodes_that_share_the_runs_folder_meet(folder: Path) -> None:
    assert meet(folder, [folder, folder]) == []


def test_a_folder_that_is_not_shared_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own" / "logs").mkdir(parents=True)
    (found,) = meet(folder, [tmp_path / "own", folder])
    assert found.startswith(f"{tmp_path / 'own'} there is not the folder that it is on node-0; run.dir has to lie on")


def test_a_folder_that_node_rank_0_cannot_write_is_told_there_alone(folder: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    assert meet(tmp_path / "nowhere", [folder]) == []
    assert time.monotonic() - started < 1.0


def test_a_port_where_nobody_or_another_answers_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = meet(folder, [folder], token="another run's")
    assert "is not reached from there" in found
    monkeypatch.setattr(probe, "MEET_SECONDS", 0.1)
    connection, found = probe.reach("127.0.0.1", free_port(), "token")
    assert connection is None and "Connection refused" in found and "firewalls" in found


def test_a_port_that_is_taken_is_told(folder: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        (found,) = probe.listen(place(folder, taken.getsockname()[1]))
    assert "cannot be listened on (Address already in use); choose another with --port" in found


def test_a_folder_that_cannot_be_written_or_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (found,) = probe.folder_problems(tmp_path / "file")
    assert "cannot write" in found and "--user" in found
    assert probe.folder_problems(tmp_path / "new" / "run") == []
    monkeypatch.setattr(probe, "FREE_BYTES", 2**60)
    (found,) = probe.folder_problems(tmp_path / "new" / "run")
    assert "MiB are free" in found


def test_an_address_that_is_loopback_on_its_own_host_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    (found,) = probe.address_problems("localhost")
    assert "means 127.0.0.1 on that host itself" in found and "--master" in found
    assert probe.address_problems("203.0.113.1") == []


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("echo 'GPU 0: H100'; echo 'GPU 1: H100'", None),
        ("echo 'GPU 0: H100'", "1 GPUs answer where 2 are wanted"),
        (
            "echo 'NVIDIA-SMI has failed' >&2; exit 9",
            "0 GPUs answer where 2 are wanted (nvidia-smi: NVIDIA-SMI has failed)",
        ),
    ],
)
def test_gpus_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, said: str | None) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{listed}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert probe.gpu_problems(2) == ([said] if said else [])
    smi.unlink()
    assert "no working nvidia-smi" in probe.gpu_problems(2)[0] and probe.gpu_problems(0) == []
