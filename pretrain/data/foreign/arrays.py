"""Arrays of token ids from bytes: NumPy's .npy without NumPy's loader, and bare numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

MAX_HEADER = 10_000  # bytes, as NumPy allows itself
MAGIC = b"\x93NUMPY"
# As NumPy writes the header of an array of one dimension. Only that is read: the general form is a Python expression.
HEADER = re.compile(
    rb"\{'descr': '([<>|])([iu])([1248])', 'fortran_order': (?:True|False), 'shape': \((\d{1,12}),\), \} *\n"
)


def npy(data: bytes) -> np.ndarray[Any, Any] | str:
    """(P,) whole numbers of a .npy file's bytes, or the reason why they are none."""
    version, lengths = data[6:7], {b"\x01": 2, b"\x02": 4, b"\x03": 4}
    if not data.startswith(MAGIC) or version not in lengths:
        return "not a .npy file"
    start = 8 + lengths[version]
    size = int.from_bytes(data[8:start], "little")
    found = HEADER.fullmatch(data[start : start + size]) if size <= MAX_HEADER else None
    if found is None:
        return "a .npy file that is not one row of whole numbers"
    dtype = np.dtype((found[1] + found[2] + found[3]).decode())
    if int(found[4]) * dtype.itemsize != len(data) - start - size:
        return "a .npy file whose size is not the declared one"
    return np.frombuffer(data, dtype, offset=start + size)


def bare(data: bytes, dtype: np.dtype[Any]) -> np.ndarray[Any, Any] | str:
    """(P,) numbers that lie one after the other, or the reason why they do not."""
    if len(data) % dtype.itemsize:
        return f"tokens whose bytes are no multiple of {dtype.itemsize}"
    return np.frombuffer(data, dtype)
