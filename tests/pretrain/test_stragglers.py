"""The rank that is slow by itself is named, with its host, whoever has to wait for it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.stragglers import HostClock, slowest
from tests.distributed import run_ranks
from tests.pretrain import running
from tests.training import write_config

SLOW = 2  # of four
STEPS = (
    "schedule.total=4 steps",
    "data.validation=null",
    "checkpoint.every=100 steps",
    "batch={size: 8, micro_size: 4}",
)


def be_slow_in_a_pass() -> None:
    from parallel.stages import Stage

    forward = Stage.forward

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.15)
        return forward(*args, **options)

    if int(os.environ["RANK"]) == SLOW:
        Stage.forward = slowly  # type: ignore[method-assign]


def be_slow_in_data() -> None:
    from pretrain.data.stream import Stream

    gather = Stream.gather

    def slowly(*args: Any) -> Any:
        time.sleep(0.3)
        return gather(*args)

    if int(os.environ["RANK"]) == SLOW:
        Stream.gather = slowly  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "layout"),
    [(be_slow_in_a_pass, "parallel={tensor: 2, zero: 1}"), (be_slow_in_data, "parallel={pipeline: 2, zero: 1}")],
)
def test_a_slow_rank_is_named_once_and_in_metrics(tmp_path: Path, tiny_data: Path, fault: Any, layout: str) -> None:
    """Of the tensor ranks 2 and 3, which wait for each other in every layer, it is 2 alone; the data of a step come from
    one read, so it is slow in every other step at most."""
    config = write_config(tmp_path, tiny_data)
    arguments = ["train", str(config), *STEPS, layout, "data.prefetch=1"]
    first, *_ = run_ranks(4, running.run_main, arguments, fault, timeout=60)
    assert first.code == 0, first.told
    lines = [line for line in running.lines_of(tmp_path / "run") if "slowest_rank" in line]
    assert len(lines) == 4
    found = [line for line in lines if line["slowest_rank"] == SLOW]
    assert found, lines
    worst = max(found, key=lambda line: line["slowest_rank_seconds"])
    assert worst["slowest_rank_seconds"] > worst["median_rank_seconds"] + 0.1
    if fault is be_slow_in_a_pass:
        assert len(found) == 4 and first.out.count(f"rank {SLOW} ({os.uname().nodename}) is slow: 0.") == 1, first.out


def test_the_slowest_is_sought_within_its_stage() -> None:
    """The second stage takes long by itself; in the first one rank is far off."""
    found = slowest([1.0, 1.1, 1.9, 1.0, 5.0, 5.1, 5.2, 5.0], list("abcdefgh"), stages=2)
    assert found == (2, "c", 1.9, 1.0)


def test_what_others_are_waited_for_is_not_a_ranks_own() -> None:
    clock = HostClock()
    time.sleep(0.02)
    with clock.around("group"):
        time.sleep(0.2)
    assert 0.02 <= clock.seconds() < 0.15
