"""Tiles of the attention kernels by device, head size and type: a table, never a timing at run time.

`tests/kernels/test_compiled.py` compiles every entry for its device without one and holds that nothing spills.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "key", "query"]


class Tile(NamedTuple):
    """rows: queries; columns: keys; of one program. stages: loads under way at once."""

    rows: int
    columns: int
    warps: int
    stages: int


INTERPRETED = Tile(16, 16, 4, 1)  # small, so that short sequences walk over several blocks
DEVICES = (80, 90, 100)  # compute capabilities times ten: A100, H100 and H200, B200


def padded(size: int) -> int:
    """The head size inside of a kernel: a power of two, at least what a matrix instruction takes."""
    return max(16, 1 << (size - 1).bit_length())


def tile(kernel: Kernel, device: int, size: int, dtype: torch.dtype) -> Tile:
    """device: of DEVICES, or 0 for the interpreter."""
    if device == 0:
        return INTERPRETED
    return TABLE[kernel, device, max(64, padded(size)), dtype.itemsize]


TABLE: dict[tuple[Kernel, int, int, int], Tile] = {}
DELTA_ROWS = 64  # of a program that sums out times its gradient
for _k in ("forward","key","query"):
    for _d in DEVICES:
        for _w in (64,128,256):
            TABLE[_k,_d,_w,2]=Tile(128,64,8,2)
            TABLE[_k,_d,_w,4]=Tile(64,32,4,1)
