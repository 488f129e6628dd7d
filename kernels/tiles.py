"""Tiles of the attention kernels by device, head size and type: a table, never a timing at run time.

`tests/kernels/test_compiled.py` compiles every entry for its device without one and holds that nothing spills.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "key", "query", "bias"]


class Tile(NamedTuple):
    """rows: queries; columns: keys; of one program, and alike for the bias kernel. stages: loads under way at once."""

    rows: int
    columns: int
    warps: int
    stages: int


INTERPRETED = Tile(16, 16, 4, 1)  # small, so that short sequences walk over several blocks
LARGEST = 256
MARGIN = 128  # rows and columns of a tile at most, where a relative bias is read
DEVICES = (80, 90, 100)  # compute capabilities times ten: A100, H100 and H200, B200


def padded(size: int) -> int:
    """The head size inside of a kernel: a power of two, at least what a matrix instruction takes."""
    return max(16, 1 << (size - 1).bit_length())


def tile(kernel: Kernel, device: int, size: int, dtype: torch.dtype, biased: bool = False) -> Tile:
    """device: of DEVICES, or 0 for the interpreter. biased: with a relative bias."""
    if device == 0:
        return INTERPRETED
    if dtype.itemsize == 2:
        table = _HALF_BIASED if biased and (device, kernel) in _HALF_BIASED else _HALF
        row = table[device, kernel]
    else:
        row = (_SINGLE_BIASED if biased else _SINGLE)[kernel]
    return row[max(0, padded(size).bit_length() - 7)]


def passes(device: int, size: int) -> list[dict[str, bool]]:
    """Launches of the key kernel: which of dK and dV each computes. Two accumulators of 256 columns do not fit into
    Hopper's registers beside all else, so there they are computed one after the other: a fourth more products."""
    if device == 90 and padded(size) == LARGEST:
        return [{"KEYS": True, "VALUES": False}, {"KEYS": False, "VALUES": True}]
    return [{"KEYS": True, "VALUES": True}]


# By device and kernel: the tiles of 16-bit types for heads of at most 64, 128 and 256. Chosen by what compiles without
# spilling, the larger first; none has been timed yet.
_HALF: dict[tuple[int, Kernel], tuple[Tile, Tile, Tile]] = {
    (80, "forward"): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    (80, "key"): (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    (80, "query"): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 1)),
    (90, "forward"): (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
    (90, "key"): (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
    (90, "query"): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    (100, "forward"): (Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 32, 8, 2)),
    (100, "key"): (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2), Tile(32, 64, 8, 2)),
    (100, "query"): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
}
# Where a tile of biases besides needs other ones.
_HALF_BIASED: dict[tuple[int, Kernel], tuple[Tile, Tile, Tile]] = {
    (80, "forward"): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    (90, "forward"): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
    (100, "forward"): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
    (80, "bias"): (Tile(64, 64, 4, 2), Tile(64, 64, 8, 1), Tile(32, 32, 4, 1)),
    (90, "bias"): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 1)),
    (100, "bias"): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)),
}
# Products of float32 are three of TF32 each, on the tensor cores: parts of a tile are held twice, so tiles are small.
_SINGLE: dict[Kernel, tuple[Tile, Tile, Tile]] = {
    "forward": (Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1)),
    "key": (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
    "query": (Tile(32, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
}
# Float32 heads of more than 64 spill in the bias kernel, of more than 128 by thousands: nobody trains such on a GPU.
_SINGLE_BIASED: dict[Kernel, tuple[Tile, Tile, Tile]] = {
    "forward": (Tile(32, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
    "key": (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    "query": (Tile(32, 32, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
    "bias": (Tile(16, 16, 4, 1), Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
}
DELTA_ROWS = 64  # of a program that sums out times its gradient
