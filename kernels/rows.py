"""What the kernels that go row by row have in common: tensors as matrices, and sums over rows in one order.

A sum over rows (the gradient of a bias) is taken by strips: a program adds up its strip's rows in a register for each column,
and torch adds up the strips. How rows are cut depends on the shape alone, so twice the same inputs give twice the same bits,
on any device.
"""

from __future__ import annotations

from torch import Tensor

SUMS = 2**20  # float32 sums that the strips leave, about: 4 MB to write and read, and enough programs for a GPU
FEWEST_STRIPS = 128


def rows_of(x: Tensor) -> Tensor:
    """(M, W) of x (..., W): the same memory where rows lie evenly apart and each is in one piece."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def strip_rows(num_rows: int, width: int, tile: int) -> int:
    """Rows of a strip, a multiple of those of a tile."""
    strips = max(FEWEST_STRIPS, SUMS // power(width))
    return -(-num_rows // (strips * tile)) * tile


def power(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << max(0, number - 1).bit_length()
