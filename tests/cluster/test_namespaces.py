"""Two machines that are namespaces with a cable between them: what a run does when the network goes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.namespaces import Machine, machines
from tests.distributed import REPOSITORY, die_with_parent
from tests.training import write_config

TIMEOUT = 6.0  # seconds that a rank waits for another
SPARE = 15.0  # seconds more: the ranks find out who it was, on a busy machine


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Machine]]:
    with machines(tmp_path, ["alpha", "beta"]) as made:
        yield made


def start(hosts: list[Machine], folder: Path, shards: Path, master: str) -> list[subprocess.Popen[str]]:
    """A long run, one process on each machine."""
    config = write_config(folder, shards, **{"total: 10 steps": "total: 1000000 steps"})
    options = [f"parallel.timeout={TIMEOUT}", "batch.micro_size=2", "--processes", "1", "--nodes", str(len(hosts))]
    return [
        subprocess.Popen(
            [
                *(*host.enter, sys.executable, "-m", "launch", "node", str(config), *options),
                *("--node-rank", str(rank), "--master", f"{master}:29500"),
            ],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        for rank, host in enumerate(hosts)
    ]


def wait_for_steps(started: list[subprocess.Popen[str]], metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + 90
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert all(each.poll() is None for each in started), [each.communicate() for each in started]
        assert time.monotonic() < deadline, "no step in 90 s"
        time.sleep(0.05)


def end(started: list[subprocess.Popen[str]]) -> None:
    for each in started:
        if each.poll() is None:
            os.killpg(each.pid, signal.SIGKILL)


def test_a_cable_that_is_pulled_ends_both_machines_in_time_and_names_the_other(
    hosts: list[Machine], tmp_path: Path, tiny_data: Path
) -> None:
    started = start(hosts, tmp_path, tiny_data, hosts[0].address)
    try:
        wait_for_steps(started, tmp_path / "run" / "metrics.jsonl", 3)
        hosts[1].pull_the_cable()
        since = time.monotonic()
        told = [each.communicate(timeout=TIMEOUT + SPARE + 30) for each in started]
        assert time.monotonic() - since < TIMEOUT + SPARE, told
    finally:
        end(started)
    assert [each.returncode for each in started] == [3, 3], told
    assert re.search(r"rank 0 \(alpha\): step \d+, .*rank 1 \(beta\) did not answer", told[0][1]), told
    assert re.search(r"rank 1 \(beta\): step \d+, .*rank 0", told[1][1]), told  # quoted from its log


def test_a_machine_that_dies_ends_the_other_at_once_and_is_named(
    hosts: list[Machine], tmp_path: Path, tiny_data: Path
) -> None:
    started = start(hosts, tmp_path, tiny_data, hosts[0].address)
    try:
        wait_for_steps(started, tmp_path / "run" / "metrics.jsonl", 3)
        started[1].kill()  # its ranks die with it
        since = time.monotonic()
        _, told = started[0].communicate(timeout=60)
        assert time.monotonic() - since < SPARE, told
    finally:
        end(started)
    assert started[0].returncode == 3
    assert re.search(r"rank 0 \(alpha\): step \d+, .*lost the others.*rank 1 \(beta\) did not answer", told), told


def test_a_name_that_is_loopback_on_its_own_machine_is_told_and_nothing_hangs(
    hosts: list[Machine], tmp_path: Path, tiny_data: Path
) -> None:
    started = start(hosts, tmp_path, tiny_data, "alpha")
    try:
        _, told = started[0].communicate(timeout=60)
    finally:
        end(started)
    assert started[0].returncode == 2
    assert "error: --master: alpha is 127.0.1.1 on node 0 (alpha), which no other machine reaches" in told
