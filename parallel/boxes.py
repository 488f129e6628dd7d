"""From an engine's flat shares to boxes of logical tensors, for checkpoints.

ZeRO cuts flattened parameters anywhere; a file wants boxes. A row (the first dimension's element) belongs to the rank that
keeps its first number; the ends of rows that lie with later ranks are sent to it, a row's length at the most for each
parameter and neighbour. So every rank writes whole rows of its own share and no rank ever holds more.

    flat share:     ....|aaaaaaaaaaaa|bbbbbbbbbb|....
    rows:       |....aaa|aaaaaa|aaabbb|bbbbbb|b....|      rank a writes rows 2 and 3, b sends it the end of row 3

Boxes are copies in host memory, so that training may go on while they are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.engine import MOMENTS, Engine, Share
from parallel.gradients import counts_once
from parallel.grid import Grid
from parallel.logical import Piece, canonical

KINDS = ("weight", *MOMENTS)  # what is kept of each logical tensor


@dataclass(frozen=True)
class Box:
    """A box of one logical tensor, in one of its kinds, and the float32 numbers in it (shape: size)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor


def row_length(parameter: Any) -> int:
    return parameter.local_shape[1] if len(parameter.local_shape) == 2 else 1


def boxes_of_rows(path: str, parameter: nn.Parameter, first: int, values: dict[str, Tensor]) -> Iterator[Box]:
    """Boxes of the local parameter's rows `first : first + n`; values: (n, ...) for each kind. Padding rows fall out."""
    count = next(iter(values.values())).shape[0]
    for piece in parameter.pieces:  # type: ignore[attr-defined]
        begin, end = max(first, piece.start), min(first + count, piece.start + piece.size[0])
        if begin >= end:
            continue
        offset = (piece.offset[0] + begin - piece.start, *piece.offset[1:])
        for kind, rows in values.items():
            yield Box(canonical(path, piece), kind, piece.shape, offset, rows[begin - first : end - first])


class HostMemory:
    """Host memory for one copy of what a rank writes (its share, float32). It lives on from copy to copy: getting fresh
    pages takes three times as long as filling them."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)

    @torch.no_grad()
    def copy(self, tensors: list[list[Tensor]]) -> list[Tensor]:
        """Each list of flat tensors in one, in this memory; the copies before are gone then."""
        sizes = [sum(part.numel() for part in parts) for parts in tensors]
        if self.flat.numel() < sum(sizes):
            self.flat = torch.empty(sum(sizes), pin_memory=torch.cuda.is_available())
        copies = list(self.flat[: sum(sizes)].split(sizes))
        for parts, whole in zip(tensors, copies, strict=True):
            for part, target in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
                target.copy_(part, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def held_boxes(engine: Engine, grid: Grid, host: HostMemory | None = None) -> list[Box]:
    """What this rank writes, copied to `host`. Over all ranks the boxes tile every logical tensor exactly once.
    Collective."""
    shares = [share for share in engine.shares() if counts_once(share.parameter, grid.tensor.rank)]
    rows = list(_replicated_rows([share for share in shares if share.replicated], grid))
    if not engine.replicated:
        rows += _sharded_rows([share for share in shares if not share.replicated], grid)
    copies = iter((host or HostMemory()).copy([parts for _, _, kinds in rows for parts in kinds.values()]))
    boxes: list[Box] = []
    for share, first, kinds in rows:
        length = share.parameter.local_shape[1:]  # type: ignore[attr-defined]
        values = {kind: next(copies).view(-1, *length) for kind in kinds}
        boxes += boxes_of_rows(share.path, share.parameter, first, values)
    return boxes


def whole_tensors(engine: Engine, grid: Grid) -> dict[str, dict[str, Tensor]]:
    """Each logical tensor whole, by name and kind, on rank 0 (elsewhere none): to compare the layouts of small models.

    After a first step exp_avg / (1 - beta1) is the clipped gradient, as the optimizer saw it. Collective.
    """
    boxes: list[Box] = held_boxes(engine, grid)
    gathered: list[list[Box]] | None = [[] for _ in range(grid.world)] if grid.rank == 0 else None
    if grid.world > 1:
        dist.gather_object(boxes, gathered)
    elif gathered is not None:
        gathered[0] = boxes
    whole: dict[str, dict[str, Tensor]] = {}
    for box in (box for part in gathered or [] for box in part):
        kinds = whole.setdefault(box.name, {})
        tensor = kinds.setdefault(box.kind, torch.full(box.shape, torch.nan))
        place = tuple(slice(first, first + n) for first, n in zip(box.offset, box.values.shape, strict=True))
        tensor[place] = box.values
    return whole


Rows = tuple[Share, int, dict[str, list[Tensor]]]  # first row, and of each kind the rows' numbers in flat parts


def _kinds(share: Share) -> dict[str, Tensor]:
    return {"weight": share.master, **share.moments}


def _replicated_rows(shares: list[Share], grid: Grid) -> Iterator[Rows]:
    """What every replica has whole: each writes its part of the rows."""
    for share in shares:
        total = share.parameter.local_shape[0]  # type: ignore[attr-defined]
        first, end = (total * r // grid.replica_size for r in (grid.replica_rank, grid.replica_rank + 1))
        if first < end:
            length = row_length(share.parameter)
            part = slice(first * length, end * length)
            yield share, first, {kind: [flat[part]] for kind, flat in _kinds(share).items()}


def _sharded_rows(shares: list[Share], grid: Grid) -> Iterator[Rows]:
    ends = _exchange_row_ends(shares, grid)
    for share in shares:
        length = row_length(share.parameter)
        first, end = -(-share.start // length), -(-(share.start + share.numel) // length)
        if first >= end:
            continue  # less than a row, which begins with an earlier rank
        own = slice(first * length - share.start, None)
        yield share, first, {k: [flat[own], *ends.get((share.path, k), [])] for k, flat in _kinds(share).items()}


class Extent(NamedTuple):
    """What a rank keeps of a flattened parameter: numbers from `start` on, the numbers of a row, and in which kinds."""

    start: int
    numel: int
    length: int
    kinds: tuple[str, ...]


def _exchange_row_ends(shares: list[Share], grid: Grid) -> dict[tuple[str, str], list[Tensor]]:
    """Send the beginnings of this rank's shares that end another rank's row; returns what others sent, in row order."""
    size, me = grid.replica_size, grid.replica_rank
    if size == 1:
        return {}
    places: list[dict[str, Extent]] = [{} for _ in range(size)]
    ours = {s.path: Extent(s.start, s.numel, row_length(s.parameter), tuple(_kinds(s))) for s in shares}
    dist.all_gather_object(places, ours, group=grid.replica_group)
    sent: list[list[Tensor]] = [[] for _ in range(size)]
    for share in shares:
        owner, count = _owner_of_head(places, me, share.path)
        if count:
            sent[owner] += [flat[:count] for flat in _kinds(share).values()]
    expected = [{path: _owner_of_head(places, rank, path) for path in places[rank]} for rank in range(size)]
    counts = [
        sum(len(places[rank][path].kinds) * count for path, (owner, count) in messages.items() if owner == me)
        for rank, messages in enumerate(expected)
    ]
    empty = torch.empty(0, device=shares[0].master.device if shares else grid.device)
    outgoing = torch.cat([empty, *(part.to(empty) for parts in sent for part in parts)])
    incoming = outgoing.new_empty(sum(counts))
    sizes = [sum(part.numel() for part in parts) for parts in sent]
    dist.all_to_all_single(incoming, outgoing, counts, sizes, group=grid.replica_group)
    received: dict[tuple[str, str], list[Tensor]] = {}
    place = 0
    for rank, messages in enumerate(expected):
        for path, (owner, count) in messages.items():
            for kind in places[rank][path].kinds if owner == me and count else ():
                received.setdefault((path, kind), []).append(incoming[place : place + count])
                place += count
    return received


def _owner_of_head(places: list[dict[str, Extent]], rank: int, path: str) -> tuple[int, int]:
    """The rank in whose row this rank's share of a parameter begins, and how many of its numbers that row wants."""
    start, numel, length, _ = places[rank][path]
    into = start % length
    if into == 0:
        return rank, 0
    row = start - into
    for other, shares in enumerate(places):
        begin, count, *_ = shares.get(path, (0, 0))
        if begin <= row < begin + count:
            return other, min(numel, length - into)
    raise AssertionError(f"no data-parallel rank keeps element {row} of {path}")


def wanted_rows(share: Share) -> tuple[int, int]:
    """The rows of the local parameter that a share needs when it is loaded: first and past the last."""
    length = row_length(share.parameter)
    return share.start // length, -(-(share.start + share.numel) // length)


def local_boxes(path: str, parameter: nn.Parameter, first: int, end: int) -> Iterator[tuple[str, Piece, int, int]]:
    """(canonical name, piece, first row, past the last row) of the local parameter's rows that hold logical ones."""
    for piece in parameter.pieces:  # type: ignore[attr-defined]
        begin, stop = max(first, piece.start), min(end, piece.start + piece.size[0])
        if begin < stop:
            yield canonical(path, piece), piece, begin, stop
