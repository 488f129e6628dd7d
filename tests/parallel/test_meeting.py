"""Ranks that cannot meet say who is missing, or what is in the way, in place of a hang."""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch.distributed as dist

from parallel import meeting
from parallel.meeting import Arrival, NotMet, apart, meet
from tests.distributed import run_ranks

TIMEOUT = 1.0  # seconds


def come(variables: dict[int, dict[str, str]], hosts: list[str], device: str = "cpu", deaf: int = -1) -> str:
    """Meet in this rank's place, as if on the host of that name; how it ended."""
    os.environ.update(variables.get(int(os.environ["RANK"]), {}))
    rank = int(os.environ["RANK"])
    meeting.platform.node = lambda: hosts[rank]  # type: ignore[attr-defined]
    if rank == deaf:
        create = socket.create_server
        meeting.socket.create_server = lambda *args, **options: _closed(create(*args, **options))  # type: ignore
    if device == "mixed":
        device = "cuda" if rank == 1 else "cpu"
    try:
        store = meet(rank, len(hosts), device, TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=len(hosts))
        dist.barrier()
    except NotMet as error:
        time.sleep(0.5)  # rank 0's store ends with it
        return str(error)
    return "met"


def _closed(server: socket.socket) -> socket.socket:
    """One that has a number and does not listen."""
    port = server.getsockname()[1]
    server.close()
    closed = socket.socket()
    closed.bind(("127.0.0.1", port))
    return closed


ON_TWO = {rank: {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"} for rank in (0, 1)}


def test_ranks_of_one_host_and_of_several_meet() -> None:
    assert run_ranks(3, come, {}, ["a"] * 3) == ["met"] * 3
    assert run_ranks(2, come, ON_TWO, ["a", "b"]) == ["met"] * 2


def test_a_host_whose_port_does_not_answer_is_named_on_all() -> None:
    for told in run_ranks(2, come, ON_TWO, ["node-a", "node-b"], "cpu", 1):
        assert told.startswith("node-a does not reach node-b (127.0.0.1, port ") and told.endswith("refused"), told


def test_a_rank_with_another_kind_of_device_is_named_before_a_group_hangs() -> None:
    words = "node-b (rank 1) would compute on cuda, the others on cpu"
    assert run_ranks(3, come, {}, ["node-a", "node-b", "node-c"], "mixed") == [words] * 3


def test_a_name_of_rank_0_that_nobody_knows_is_told() -> None:
    told = run_ranks(1, come, {0: {"RANK": "1", "MASTER_ADDR": "no-such-host.invalid"}}, ["node-a", "node-b"])[0]
    assert told.startswith("node-b does not know the name no-such-host.invalid (MASTER_ADDR), for 1 s: ")


def test_a_store_that_nobody_serves_is_told() -> None:
    told = run_ranks(1, come, {0: {"RANK": "1", "MASTER_PORT": str(_unused())}}, ["node-a", "node-b"])[0]
    assert told.startswith("node-b has found nobody at 127.0.0.1, port ") and "for 1 s: rank 0 has not come" in told


def _unused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def arrival(rank: int, host: str, address: str = "10.0.0.1", picked: bool = False, device: str = "cpu") -> Arrival:
    return Arrival(rank, host, address, picked, 0, device)


@pytest.mark.parametrize("address", ["127.0.1.1", "127.0.0.1", "::1"])
def test_a_host_whose_own_name_leads_to_itself_is_named(address: str) -> None:
    """As Debian's /etc/hosts has it: gloo would tell the others that address, and they would wait for each other."""
    told = apart([arrival(0, "a"), arrival(1, "b", address)])
    assert told.startswith("b: the host's own name leads to its loopback") and "GLOO_SOCKET_IFNAME" in told
    assert not apart([arrival(0, "a"), arrival(1, "b", address, picked=True)])
    assert not apart([arrival(0, "b", address), arrival(1, "b", address)]), "one host needs no other address"


def test_those_who_have_not_come_are_counted() -> None:
    told = {rank: arrival(rank, "ab"[rank % 2]) for rank in (0, 1)}
    assert meeting._missing(60)(told, 3) == "rank 2 of 3 has not come within 60 s; here are those of a, b"
    many = meeting._missing(60)(told, 64)
    assert many.startswith("ranks 2, 3, 4,") and " and 42 more of 64 have not come" in many
