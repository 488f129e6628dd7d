from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretrain.data.order import key
from pretrain.data.selection.sorting import Sorter, in_order, rows_up_to


def records(count: int, columns: int, size: int) -> np.ndarray:
    found = key(3, np.arange(count * columns)).reshape(count, columns) % np.uint64(size)
    found[:, -1] = np.arange(count)
    return found


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("size", [1, 3, 10**12])
@pytest.mark.parametrize("memory", [1, 400_000, 1 << 24])
def test_blocks_are_all_records_in_order_whatever_fits(tmp_path: Path, columns: int, size: int, memory: int) -> None:
    """From one key for all to one each; in memory, and in many files."""
    everything = records(20_000, columns, size)
    sorter = Sorter(tmp_path, columns, memory)
    for first in range(0, len(everything), 777):
        sorter.add(everything[first : first + 777])
    spilled = len(list(tmp_path.iterdir()))
    blocks = list(sorter.blocks())
    assert np.array_equal(np.concatenate(blocks), in_order(everything))
    assert (spilled > 1) == (memory < 1 << 24)
    if memory == 400_000:
        assert max(map(len, blocks)) <= sorter.rows
    assert list(tmp_path.iterdir()) == [], "files are removed"


def test_nothing_sorts_to_nothing(tmp_path: Path) -> None:
    sorter = Sorter(tmp_path, 2, 1000)
    sorter.add(np.zeros((0, 2), np.uint64))
    assert list(sorter.blocks()) == []


def test_rows_up_to_a_bound() -> None:
    rows = np.array([[1, 5], [1, 7], [2, 1], [2, 3], [2, 3], [4, 0]], np.uint64)
    for bound, count in [([0, 9], 0), ([1, 6], 1), ([2, 3], 5), ([3, 0], 5), ([9, 0], 6)]:
        assert rows_up_to(rows, np.array(bound, np.uint64)) == count
