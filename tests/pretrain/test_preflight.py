"""Before a run its hosts are checked, and the one that is not fit is named, with why."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain import fitness, links, resources
from pretrain.errors import Unfit
from pretrain.fitness import Finding, Seen, Verdict
from tests.distributed import run_ranks
from tests.pretrain import running
from tests.training import write_config

FOUR = ("parallel={tensor: 2, zero: 1}",)


def be_hosts(plant: Callable[[], None] | None = None, on: int = -1) -> None:
    """Each rank is as if on a host of its own, node-0 to node-3; one has a fault."""
    import platform

    rank = int(os.environ["RANK"])
    platform.node = lambda: f"node-{rank}"  # type: ignore[assignment]
    if plant is not None and rank == on:
        plant()


def preflight(folder: Path, shards: Path, *extra: str, world: int = 4, fault: Any = None) -> list[running.Ran]:
    config = write_config(folder, shards)
    ran: list[running.Ran] = run_ranks(world, running.run_main, ["preflight", str(config), *extra], fault, timeout=60)
    return ran


def clock_is_off() -> None:
    from pretrain import preflight

    preflight.now = lambda: time.time() + 5.0


def memory_is_short() -> None:
    resources.free_memory = lambda: 1000


def disk_is_short() -> None:
    resources.free_disk = lambda folder: (1000, "")


def computes_wrong() -> None:
    resources.computes_right = lambda device: False


def network_is_slow() -> None:
    """Whatever it sends or receives is late."""
    from parallel.collectives import Watch

    def late(group: str) -> Any:
        time.sleep(0.2)
        return nullcontext()

    original = links.rates

    def slowly(*args: Any) -> Any:
        Watch(late).__enter__()
        return original(*args)

    links.rates = slowly


def version_differs() -> None:
    from importlib.metadata import version

    from pretrain import agreement

    agreement.version = lambda name: "9.9" if name == "torch" else version(name)


PLANTS: dict[Callable[[], None], tuple[str, str]] = {
    clock_is_off: ("clock", "its clock is 5.0 s ahead of the others'"),
    memory_is_short: ("memory", "0.00 GiB of its memory are free, 1 ranks need"),
    disk_is_short: ("disk", "0.00 GiB are free for run.dir, checkpoints need"),
    computes_wrong: ("device", "a product of whole numbers comes out wrong"),
    network_is_slow: ("link", "a slow link: all-reduces reach world "),
}


def test_hosts_that_are_fit_are_told_in_a_few_lines(tmp_path: Path, tiny_data: Path) -> None:
    first, *others = preflight(tmp_path, tiny_data, *FOUR)
    assert first.code == 0 and first.err == "", first.told
    assert first.out.startswith("1 host, 4 ranks, on cpu\nclocks: at most 0.")
    assert "all-reduce of a mebibyte: world " in first.out and ", tensor " in first.out and ", replicas " in first.out
    assert [(ran.code, ran.told) for ran in others] == [(0, "")] * 3
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"


@pytest.mark.parametrize("plant", PLANTS)
def test_the_host_with_a_fault_is_named_and_to_be_left_out(
    tmp_path: Path, tiny_data: Path, plant: Callable[[], None]
) -> None:
    """As JSON on standard output, in words on standard error, on rank 0 alone; every rank ends with 5."""
    fault = partial(be_hosts, plant, 2)
    options = ("--floor", "10") if plant is network_is_slow else FOUR
    first, *others = preflight(tmp_path, tiny_data, *options, "--json", fault=fault)
    check, words = PLANTS[plant]
    told = json.loads(first.out)
    [finding] = told["findings"]
    assert (finding["check"], finding["host"], finding["ranks"]) == (check, "node-2", [2]) and words in finding["words"]
    assert told["ready"] is False and told["exclude"] == ["node-2"] and len(told["ranks"]) == 4
    assert first.err.startswith("error: node-2 is not fit for this run:\n  node-2 (rank 2): ") and words in first.err
    assert first.err.endswith("start without: --exclude node-2\n")
    assert [ran.code for ran in (first, *others)] == [5] * 4 and not any(ran.told for ran in others)


def test_ranks_that_were_given_something_else_are_a_mistake(tmp_path: Path, tiny_data: Path) -> None:
    ran = preflight(tmp_path, tiny_data, world=2, fault=partial(be_hosts, version_differs, 1))
    for one in ran:
        running.assert_refused(one, "rank 1 (node-1) differs", "version of torch: 9.9 on rank 1")


def test_a_rank_that_does_not_come_is_named_in_time(tmp_path: Path, tiny_data: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    started = time.monotonic()
    with pytest.raises(AssertionError, match="exit code 3"):
        run_ranks(2, come_alone, str(config))
    assert time.monotonic() - started < 30


def come_alone(config: str) -> None:
    if os.environ["RANK"] == "0":
        running.run_main(["preflight", config, "--timeout", "1"])


# -- as training starts ----------------------------------------------------------------------------------------------


def test_a_host_that_computes_wrong_does_not_start_a_run(tmp_path: Path, tiny_data: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    fault = partial(be_hosts, computes_wrong, 1)
    first, second = run_ranks(
        2, running.run_main, ["train", str(config), *running.SHORT, "batch.micro_size=1"], fault, timeout=60
    )
    assert first.code == second.code == 5 and "error: node-1 is not fit for this run" in first.err, first.told
    assert second.told == "" and not (tmp_path / "run").exists()


def test_what_may_only_spoil_a_run_is_warned_of(tmp_path: Path, tiny_data: Path) -> None:
    options = (*running.SHORT, "schedule.total=1 steps", "monitor.validate_every=null")
    ran = running.train(tmp_path, tiny_data, *options, fault=disk_is_short)
    assert ran.code == 0 and "warning: " in ran.out and "are free for run.dir, checkpoints need" in ran.out, ran.told


def test_a_floor_that_no_group_reaches_names_no_host_alone(tmp_path: Path, tiny_data: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    arguments = ["train", str(config), *running.SHORT, "batch.micro_size=1", "parallel.bandwidth_floor=1e9"]
    first, _ = run_ranks(2, running.run_main, arguments, be_hosts, timeout=60)
    assert first.code == 5 and "node-0, node-1 are not fit" in first.err and "--exclude" not in first.err, first.told


# -- findings --------------------------------------------------------------------------------------------------------


def seen(rank: int, host: str, **fields: Any) -> Seen:
    plenty = 2**40
    usual = Seen(rank, host, "H100", f"GPU-{rank}", True, [], 10, plenty, 5, plenty, plenty, "", 0.0)
    return usual._replace(**fields)


FOUND = {
    "two ranks on one GPU": ({"gpu": "GPU-0"}, "a", "2 ranks share 1 GPUs"),
    "another device": ({"host": "b", "device": "A100"}, "b", "has A100, the others H100"),
    "errors in memory": ({"host": "b", "broken": ["3"]}, "b", "errors in memory that were not mended, on GPU 3"),
    "a full GPU": ({"needs": 2**41}, "a", "1024.00 GiB of its GPU are free, it needs 2048.00 GiB"),
    "a full host": ({"host": "b", "host_has": 4}, "b", "0.00 GiB of its memory are free, 1 ranks need 0.00 GiB"),
    "a folder that is not ours": (
        {"host": "b", "unwritable": "/x is not writable"},
        "b",
        "run.dir: /x is not writable",
    ),
    "a clock behind": ({"host": "b", "clock": -1.5}, "b", "its clock is 1.5 s behind the others'"),
}


@pytest.mark.parametrize("case", FOUND)
def test_finding(case: str) -> None:
    fields, host, words = FOUND[case]
    ranks = [seen(0, "a"), seen(1, **{"host": "a", **fields}), seen(2, "c")]
    [finding] = fitness.findings(ranks, needs_disk=1000)
    assert finding.host == host and finding.words.startswith(words)
    assert not fitness.findings([seen(0, "a"), seen(1, "a", clock=0.9), seen(2, "b")], 1000)


def test_hosts_are_left_out_unless_all_would_be() -> None:
    ranks = [seen(0, "a"), seen(1, "b")]
    found = [Finding("clock", "b", [1], "off")]
    assert Verdict(ranks, {}, 0, found).exclude == ["b"]
    assert Verdict(ranks, {}, 0, [*found, Finding("disk", "a", [0], "full")]).exclude == []


@pytest.mark.parametrize(
    ("slow", "ranks"),
    [([1, 2], [2]), ([0, 3], [0]), ([1], [1, 2]), ([0, 1, 2, 3], [0, 1, 2, 3]), ([], [])],
)
def test_a_slow_rank_is_at_both_ends_of_slow_links(slow: list[int], ranks: list[int]) -> None:
    assert links.slow_ranks([1.0 if rank in slow else 9.0 for rank in range(4)], 5.0) == ranks


def test_memory_is_what_the_host_and_its_limits_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a container, files that its use counts are free."""
    monkeypatch.setattr(resources, "CGROUPS", [])
    whole = resources.free_memory()
    assert 2**26 < whole < 2**50
    monkeypatch.setattr(resources, "CGROUPS", [(tmp_path, "memory.max", "memory.current")])
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(resources.free_memory() - whole) < 2**32
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.current").write_text("40000000\n")
    assert resources.free_memory() == 10_000_000
    (tmp_path / "memory.stat").write_text("anon 3\ninactive_file 7000000\n")
    assert resources.free_memory() == 17_000_000


def test_a_folder_to_be_made_is_on_the_disk_of_the_one_above(tmp_path: Path) -> None:
    free, unwritable = resources.free_disk(tmp_path / "runs" / "new")
    assert unwritable == "" and free == pytest.approx(resources.free_disk(tmp_path)[0], rel=0.1)


def test_gpus_with_errors_are_those_that_the_driver_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nprintf '0, 0\\n1, 12\\n2, [N/A]\\n'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert resources.broken_devices() == ["1"]
    script.unlink()
    assert resources.broken_devices() == []


def test_the_exit_code_of_an_unfit_host_is_its_own() -> None:
    assert Unfit.exit_code == 5
