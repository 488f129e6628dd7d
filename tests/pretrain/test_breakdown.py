"""The arithmetic of a profile: intervals against sets of points, and a breakdown of made-up events known by hand."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType

from pretrain.breakdown import (
    LONGEST,
    MARK,
    PARTS,
    Breakdown,
    Operator,
    break_down,
    common,
    length,
    minus,
    table,
    union,
)

INTERVALS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda pair: (pair[0], sum(pair))), max_size=8
)


def points(intervals: list[tuple[int, int]]) -> set[int]:
    return {point for start, end in intervals for point in range(start, end)}


@given(INTERVALS, INTERVALS)
def test_intervals_are_sets_of_points(ours: Any, others: Any) -> None:
    left, right = union(ours), union(others)
    for found, expected in (
        (left, points(ours)),
        (minus(left, right), points(ours) - points(others)),
        (common(left, right), points(ours) & points(others)),
    ):
        assert points(found) == expected and length(found) == len(expected)
        assert all(start < end for start, end in found)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(found))


# -- a breakdown -----------------------------------------------------------------------------------------------------


def event(name: str, start: float, end: float, device: Any = DeviceType.CPU, **more: Any) -> Any:
    """Microseconds. Ranges of ours are told apart by their name, as record_function marks them."""
    fields = {
        "is_async": False,
        "is_user_annotation": name.startswith(MARK),
        "self_cpu_time_total": end - start,
        "self_device_time_total": 0.0,
        **more,
    }
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device, **fields)


def ours(name: str, start: float, end: float) -> Any:
    return event(MARK + name, start, end)


def milliseconds(found: Breakdown) -> dict[str, float]:
    return {part: pytest.approx(seconds * 1e3) for part, seconds in found.parts.items()}


# Two steps of 100 ms and 60 ms with 1,000 ms between them, in which a validation passes forward and talks.
HOST = [
    ours("step", 0, 100_000),
    ours("data", 0, 5_000),
    ours("communication", 3_000, 4_000),  # in data
    ours("forward", 10_000, 30_000),
    ours("communication", 12_000, 16_000),  # in forward
    ours("backward", 30_000, 60_000),
    ours("communication", 58_000, 63_000),  # 2 ms of backward, 3 of the rest
    ours("optimizer", 70_000, 90_000),
    ours("forward", 500_000, 600_000),
    ours("communication", 550_000, 580_000),
    ours("step", 1_100_000, 1_160_000),
    ours("forward", 1_100_000, 1_110_000),
    ours("forward", 1_120_000, 1_130_000),
    event("aten::mm", 10_000, 20_000),
    event("aten::mm", 1_100_000, 1_105_000),
    event("aten::mm", 500_000, 600_000),  # the validation's
    event("gloo:all_reduce", 12_000, 90_000, is_async=True),
]


def test_parts_are_those_of_the_ranges_without_their_communication() -> None:
    parts = milliseconds(break_down(HOST))
    assert parts == {
        "data": (5 - 1) / 2,
        "forward": (20 - 4 + 10 + 10) / 2,
        "backward": (30 - 2) / 2,
        "communication": (1 + 4 + 5) / 2,
        "optimizer": 20 / 2,
        "Python (rest)": (160 - 4 - 36 - 28 - 10 - 20) / 2,
    }
    assert list(parts) == list(PARTS)


def test_operators_are_those_within_the_steps_and_a_step_each() -> None:
    assert break_down(HOST).operators == [Operator("aten::mm", pytest.approx(0.0075), 1.0)]


def test_a_gpu_talks_where_it_does_nothing_else() -> None:
    """NCCL's kernel of 30 ms runs beside a product for 20 of them; its range on the device is no kernel."""
    device = [
        event("ncclDevKernel_AllReduce_Sum_bf16", 40_000, 57_000, DeviceType.CUDA),
        event("gemm", 35_000, 50_000, DeviceType.CUDA),
        event("pretrain: backward", 30_000, 60_000, DeviceType.CUDA),
    ]
    parts = milliseconds(break_down([*HOST, *device]))
    assert parts["communication"] == (1 + 4 + 5 + 7) / 2
    assert parts["backward"] == (30 - 2 - 7) / 2


def test_operators_of_a_gpu_go_by_its_time() -> None:
    host = [ours("step", 0, 100), event("aten::mm", 0, 90), event("aten::add", 90, 95, self_device_time_total=40.0)]
    assert [operator.name for operator in break_down(host).operators] == ["aten::add", "aten::mm"]


def test_a_compiled_graph_has_a_name_for_people_and_ten_operators_are_told() -> None:
    graph = "## Call CompiledFxGraph fmqtlxooha4ix63oi6kh3hns46vlmhbjxisrtpyrb3patbdglfzj ##"
    host = [ours("step", 0, 1000), event(graph, 0, 100), *(event(f"op{i}", 100 + i, 101 + 2 * i) for i in range(20))]
    names = [operator.name for operator in break_down(host).operators]
    assert names == ["fused loops of compiled graph fmqtlx", *(f"op{i}" for i in range(19, 20 - LONGEST, -1))]


def test_the_table_tells_means_and_extremes_whose_sum_is_the_step() -> None:
    parts = dict.fromkeys(PARTS, 0.010)
    one = Breakdown({**parts, "data": 0.002}, [Operator("aten::mm", 0.004, 12.0)])
    other = Breakdown({**parts, "data": 0.004}, [])
    lines = table([one, other], 4, 8)
    rows = {line[:16].strip(): line[16:].split() for line in lines[2 : 2 + len(PARTS) + 1]}
    assert lines[0].startswith("where a step's time goes (mean of steps 4 to 8, 2 ranks;")
    assert rows["data"] == ["3.00", "5.7%", "2.00", "4.00"]
    assert rows["step"] == ["53.00", "100.0%", "52.00", "54.00"]
    assert re.fullmatch(r"  aten::mm +4\.00 +12", lines[-1])
    assert "least" not in table([one], 4, 8)[1]
