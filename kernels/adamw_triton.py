"""AdamW and the sum of squares as single Triton launches over many tensors. Imports triton: see `kernels.adamw`.

A table holds each tensor's addresses, a list of (tensor, block) pairs what each program works on. Both lie on the device;
the pairs are made once, the addresses copied there again only where one has changed. A whole block of tensors that all begin
at a multiple of 16 bytes is moved in accesses of 128 bits; what is left of a tensor, and tensors that begin elsewhere, are
moved element by element.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program: with 4 warps 8 a thread, which is 128 bits of a bfloat16 gradient
NUM_WARPS = 4
COLUMNS = tl.constexpr(6)  # of a tensor's row: addresses of master, gradient, exp_avg, exp_avg_sq, copy; elements

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointers(address, ELEMENT: tl.constexpr, offsets, WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(ELEMENT))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offsets


@triton.jit
def _load(address, ELEMENT: tl.constexpr, offsets, mask, WHOLE: tl.constexpr):
    """float32 (BLOCK,)"""
    pointers = _pointers(address, ELEMENT, offsets, WHOLE)
    values = tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(address, ELEMENT: tl.constexpr, offsets, mask, values, WHOLE: tl.constexpr):
    pointers = _pointers(address, ELEMENT, offsets, WHOLE)
    if WHOLE:
        tl.store(pointers, values.to(ELEMENT))
    else:
        tl.store(pointers, values.to(ELEMENT), mask=mask)


@triton.jit
def _adamw_block(
    master,
    gradient,
    average,
    square,
    copy,
    offsets,
    mask,
    shrink,
    clip,
    rate,
    root2,
    beta2,
    rest1,
    rest2,
    epsilon,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    COPY: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """master to copy: addresses; shrink: 1 - lr * decay; clip: what gradients are multiplied by; rest: 1 - beta; rate:
    lr / (1 - beta1^t); root2: 1 / sqrt(1 - beta2^t)."""
    w = _load(master, tl.float32, offsets, mask, WHOLE)
    g = _load(gradient, GRADIENT, offsets, mask, WHOLE) * clip
    m = _load(average, MOMENT, offsets, mask, WHOLE)
    v = _load(square, MOMENT, offsets, mask, WHOLE)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w = w * shrink - rate * (m / (tl.sqrt(v) * root2 + epsilon))
    _store(master, tl.float32, offsets, mask, w, WHOLE)
    _store(average, MOMENT, offsets, mask, m, WHOLE)
    _store(square, MOMENT, offsets, mask, v, WHOLE)
    if COPY is not None:
        _store(copy, COPY, offsets, mask, w, WHOLE)


@triton.jit
def adamw_kernel(
    table,
    pairs,
    decays,
    divisor,
    skipped,
    corrections,
    lr,
    beta2,
    rest1,
    rest2,
    epsilon,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a pair. table (tensors, COLUMNS) int64, pairs (programs, 2) int32, decays (tensors,) float32; divisor and
    skipped () and corrections (2,), 1 - beta^t, float32."""
    if tl.load(skipped) == 0.0:
        tensor = tl.load(pairs + 2 * tl.program_id(0))
        first = tl.multiple_of(tl.load(pairs + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK, BLOCK)
        row = table + tensor * COLUMNS
        master, gradient, average = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        square, copy, numel = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
        shrink = 1.0 - lr * tl.load(decays + tensor)
        clip = 1.0 / tl.load(divisor)
        rate = lr / tl.load(corrections)
        root2 = 1.0 / tl.sqrt(tl.load(corrections + 1))
        offsets = first + tl.arange(0, BLOCK)
        mask = offsets < numel
        aligned = (master | gradient | average | square | copy) % 16 == 0
        if aligned & (first + BLOCK <= numel):
            _adamw_block(
                master, gradient, average, square, copy, offsets, mask, shrink, clip, rate, root2, beta2, rest1, rest2,
                epsilon, GRADIENT, MOMENT, COPY, True,
            )  # fmt: skip
        else:
            _adamw_block(
                master, gradient, average, square, copy, offsets, mask, shrink, clip, rate, root2, beta2, rest1, rest2,
                epsilon, GRADIENT, MOMENT, COPY, False,
            )  # fmt: skip


@triton.jit
def square_kernel(table, pairs, counted, sums, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """sums (programs,) float32: of the squares of a block of gradients, 0 where counted (tensors,) int32 is."""
    tensor = tl.load(pairs + 2 * tl.program_id(0))
    first = tl.multiple_of(tl.load(pairs + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK, BLOCK)
    gradient, numel = tl.load(table + tensor * COLUMNS + 1), tl.load(table + tensor * COLUMNS + 5)
    offsets = first + tl.arange(0, BLOCK)
    mask = offsets < numel
    total = 0.0
    if tl.load(counted + tensor) != 0:
        if (gradient % 16 == 0) & (first + BLOCK <= numel):
            g = _load(gradient, GRADIENT, offsets, mask, True)
            total = tl.sum(g * g)
        else:
            g = _load(gradient, GRADIENT, offsets, mask, False)
            total = tl.sum(g * g)
    tl.store(sums + tl.program_id(0), total)


class Table:
    """A batch's tensors as the kernels see them."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Tensor]] = {}
        self.pairs = torch.empty(0)

    def point(self, batch: Any) -> Table:
        """Bring the addresses up to date; batch: `kernels.adamw.Batch`."""
        self.masters = batch.masters  # kept, so that no other parameter can have the identity of one of these
        device = batch.masters[0].device
        columns = (batch.masters, batch.gradients, batch.averages, batch.squares)
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in columns]
        addresses.append([copy.data_ptr() for copy in batch.copies] or [0] * len(batch.masters))
        sizes = [master.numel() for master in batch.masters]
        self.addresses = self.uploaded("addresses", [*zip(*addresses, sizes, strict=True)], torch.int64, device)
        self.decays = self.uploaded("decays", batch.decays, torch.float32, device)
        self._cut(sizes, device)
        return self

    def uploaded(self, name: str, values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values on the device, copied there (through pinned memory, not waited for) where they have changed."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != values:
            self._kept[name] = (list(values), _upload(torch.tensor(values, dtype=dtype), device))
        return self._kept[name][1]

    def _cut(self, sizes: list[int], device: torch.device) -> None:
        kept = self._kept.get("sizes")
        if kept is None or kept[0] != sizes:
            self._kept["sizes"] = (sizes, _upload(pairs_of(sizes), device))
        self.pairs = self._kept["sizes"][1]


def pairs_of(sizes: Sequence[int]) -> Tensor:
    """(programs, 2) int32: tensor and block of each program, for tensors of so many elements."""
    blocks = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes], dtype=torch.int64)
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
    firsts = torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
    return torch.stack((tensors, torch.arange(len(tensors)) - firsts), dim=1).to(torch.int32)


def step(table: Table, batch: Any, count: Tensor, bound: Any) -> None:
    """Update a batch; count: () float32, this update included; bound: `kernels.adamw.Bound` or None."""
    device = count.device
    beta1, beta2 = batch.betas
    betas = table.uploaded("betas", [beta1, beta2], torch.float64, device)
    corrections = (1.0 - betas ** count.double()).float()  # in float32, 1 - beta^t would lose three digits
    divisor = None if bound is None else bound.divisor
    _launch(
        adamw_kernel,
        table,
        table.decays,
        table.uploaded("one", [1.0], torch.float32, device) if divisor is None else divisor,
        table.uploaded("zero", [0.0], torch.float32, device) if bound is None else bound.skipped,
        corrections,
        *(batch.learning_rate, beta2, 1.0 - beta1, 1.0 - beta2, batch.epsilon),
        GRADIENT=ELEMENTS[batch.gradients[0].dtype],
        MOMENT=ELEMENTS[batch.averages[0].dtype],
        COPY=ELEMENTS[batch.copies[0].dtype] if batch.copies else None,
    )


def square_sum(table: Table, batch: Any, counted: list[bool]) -> Tensor:
    """(), float64: the sum of the squares of the counted tensors' gradients, in the order of the blocks."""
    device = batch.masters[0].device
    sums = torch.empty(len(table.pairs), dtype=torch.float32, device=device)
    flags = table.uploaded("counted", list(map(int, counted)), torch.int32, device)
    _launch(square_kernel, table, flags, sums, GRADIENT=ELEMENTS[batch.gradients[0].dtype])
    return sums.double().sum()


def _launch(kernel: Any, table: Table, *arguments: Any, **options: Any) -> None:
    if not len(table.pairs):
        return
    grid = (len(table.pairs),)
    options = {**options, "BLOCK": BLOCK, "num_warps": NUM_WARPS, "enable_fp_fusion": True}
    with torch.cuda.device_of(table.pairs):
        kernel[grid](table.addresses, table.pairs, *arguments, **options)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
