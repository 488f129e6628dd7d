"""Random numbers without a generator: each is a hash of (key, row, column).

A mask element is a function of its place in the *unsharded* activation, so every layout, tile size and recomputation sees
the same mask and there is no state to save. 32-bit integer arithmetic only (it wraps in torch, vectorises on a CPU and is
what a GPU multiplies fastest). The mixer is the `triple32` bijection of C. Wellons, "Prospecting for Hash Functions" (2018),
whose bias is within noise of an ideal random permutation; a row's key is mixed with the column by one further round.

Always: a place is multiplied only after it was mixed with a key, or by so little that it stays below 2^31. In inductor's C++ a
place is a loop counter, whose range GCC knows, and it takes signed overflow for impossible: a product that must overflow
becomes a constant, and the mask another one than outside of torch.compile.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_M32 = 0xFFFFFFFF


def key(*parts: int | str) -> int:
    """A 31-bit key of a purpose: `key(seed, "dropout")`. Stable across Python versions and machines."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def _i32(value: int) -> int:
    value &= _M32
    return value - (1 << 32) if value >= 1 << 31 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32 (torch's own is arithmetic)."""
    return (x >> bits) & (_M32 >> bits)


def mix(x: Tensor) -> Tensor:
    """`triple32` on int32, elementwise: a bijection of 32 bits."""
    x = (x ^ _shift(x, 17)) * _i32(0xED5AD4BB)
    x = (x ^ _shift(x, 11)) * _i32(0xAC4C1B51)
    x = (x ^ _shift(x, 15)) * _i32(0x31848BAB)
    return x ^ _shift(x, 14)


def mix_fast_(x: Tensor) -> Tensor:
    """`lowbias32` of the same source on x itself: two products; enough for the last round over columns of an already mixed
    row key. In place, since without torch.compile it is memory that takes the time (4 times as long with new tensors)."""
    for bits, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= (x >> bits).bitwise_and_(_M32 >> bits)
        x *= _i32(factor)
    x ^= (x >> 16).bitwise_and_(_M32 >> 16)
    return x


def sample_keys(seed: int, numbers: Tensor) -> Tensor:
    """(B,) int32 keys for sample numbers (B,) int64: what dropout takes for each sequence of a batch."""
    low = (numbers & _M32).to(torch.int64)
    high = (numbers >> 32).to(torch.int64)
    wrap = lambda x: torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)  # noqa: E731
    return mix(mix(wrap(low) ^ _i32(key(seed, "sample"))) + mix(wrap(high) ^ _i32(0x9E3779B9)))


def split_keys(keys: Tensor, first: int, count: int) -> Tensor:
    """(B * count,) int32 keys of the parts `first : first + count` (attention's heads) of each of keys (B,).

    A part's key depends on its number alone, so a mask is the same however the parts are shared out.
    """
    parts = torch.arange(first, first + count, dtype=torch.int32, device=keys.device)
    return mix(mix(keys ^ _i32(0x9E3779B9))[:, None] ^ parts[None, :]).reshape(-1)


def bits(keys: Tensor, site: int, places: Tensor) -> Tensor:
    """(B, n) int64 numbers, uniform in [0, 2^32), of keys (B,) int32 from `sample_keys` at places (n,) of one site."""
    mixed = mix(mix(keys ^ _i32(site * 0x9E3779B9))[:, None] ^ places.to(torch.int32)[None, :])
    return mixed.to(torch.int64) + 2**31


def keep_mask(keys: Tensor, site: int, rows: Tensor, columns: Tensor, rate: float) -> Tensor:
    """Boolean mask, True with probability 1 - rate.

    keys (B,) int32 from `sample_keys`; site: which dropout of the model (unique within it); rows (R,) and columns (C,) int
    places in the unsharded activation, columns below a million. Returns (B, R, C).
    """
    site_keys = mix(keys ^ _i32(site * 0x9E3779B9))
    row_keys = mix(site_keys[:, None] ^ rows.to(torch.int32)[None, :])
    # Spread, or rows whose keys differ in their low bits alone would have the same mask in another order.
    column_keys = columns.to(torch.int32) * 2039
    bits = mix_fast_(row_keys[:, :, None] ^ column_keys[None, None, :])
    return bits >= math.floor(rate * 2**32) - 2**31


def dropout(x: Tensor, rate: float, keys: Tensor, site: int, first_row: int = 0, first_column: int = 0) -> Tensor:
    """Dropout of x (B, R, C); its rows and columns begin at `first_row` and `first_column` of the unsharded activation.
    Scales by 1 / (1 - rate)."""
    if rate == 0.0:
        return x
    rows = torch.arange(first_row, first_row + x.shape[1], device=x.device)
    columns = torch.arange(first_column, first_column + x.shape[2], device=x.device)
    return torch.where(keep_mask(keys, site, rows, columns, rate), x * (1.0 / (1.0 - rate)), 0.0)


def normal(purpose: int, shape: tuple[int, ...], offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers of the box `offset : offset + size` of a tensor of `shape` (1 or 2 dimensions).

    Element (i, j) depends on (purpose, i, j) alone. Box-Muller (Box and Muller 1958) on two 32-bit hashes, in float64.
    """
    rows = torch.arange(offset[0], offset[0] + size[0], dtype=torch.int32)
    columns = (
        torch.arange(offset[1], offset[1] + size[1], dtype=torch.int32) if len(shape) == 2 else torch.zeros(1).int()
    )
    row_keys = mix(mix(rows + _i32(purpose)) ^ _i32(purpose * 0x9E3779B9))[:, None]
    first = mix(row_keys + mix(2 * columns)[None, :])
    second = mix(row_keys + mix(2 * columns + 1)[None, :])
    uniform = (first.to(torch.float64) + 2**31 + 0.5) / 2**32
    angle = (second.to(torch.float64) + 2**31) * (2 * math.pi / 2**32)
    values = torch.sqrt(-2.0 * torch.log(uniform)) * torch.cos(angle)
    return values.to(torch.float32).reshape(size)
