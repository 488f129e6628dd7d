"""The hashes of `kernels.noise` inside of a Triton kernel: the same bits for the same key, row and column."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """`kernels.noise.mix` (triple32), elementwise, of 32-bit integers; returns uint32, whose shift is logical."""
    x = x.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def mix_fast(x):
    """`kernels.noise.mix_fast_` (lowbias32)."""
    x = x.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def site_key(keys, batch, head, site):
    """The key of one head of one sequence: `split_keys` and the first line of `keep_mask`.

    keys: pointer to (B,) int32; site: the site's number times 0x9E3779B9, as int32.
    """
    sample = tl.load(keys + batch).to(tl.uint32, bitcast=True)
    head_key = mix(mix(sample ^ 0x9E3779B9) ^ head.to(tl.uint32, bitcast=True))
    return mix(head_key ^ tl.cast(site, tl.int32).to(tl.uint32, bitcast=True))


@triton.jit
def activation_rows(keys, batches, places, site, mask):
    """uint32 keys of rows of an activation: the first two lines of `keep_mask`. keys: pointer to (B,) int32; batches and
    places of the rows, int32; site: as in `site_key`."""
    samples = tl.load(keys + batches, mask=mask, other=0).to(tl.uint32, bitcast=True)
    return row_keys(mix(samples ^ tl.cast(site, tl.int32).to(tl.uint32, bitcast=True)), places)


@triton.jit
def row_keys(key, places):
    """uint32 keys of the rows at `places` (int32)."""
    return mix(key ^ places.to(tl.uint32, bitcast=True))


@triton.jit
def kept(rows, columns, threshold):
    """Which elements stay: rows, keys from `row_keys`, and columns, int32 places, of shapes that broadcast."""
    bits = mix_fast(rows ^ (columns * 2039).to(tl.uint32, bitcast=True))
    return bits.to(tl.int32, bitcast=True) >= threshold
