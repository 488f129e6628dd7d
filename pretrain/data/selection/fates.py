"""What becomes of each document of a piece, once all pieces' duplicates are known: a file that `cluster` writes and the
processes that encode the piece read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from pretrain.data.selection.rules import Array
from pretrain.errors import UserError


class Fates:
    """Of documents in their order. Rows of DTYPE: reason (`reasons.py`), the value that its rule measured, the cluster as the
    piece and place of its first document, that one's exact hash (`mark`: a part of the split is chosen by it, so that copies
    stay together), and how
    many documents the cluster has, 1 for all but its first."""

    DTYPE: ClassVar = np.dtype(
        [
            ("reason", "u1"),
            ("value", "<f8"),
            ("mark", "<u8", (2,)),
            ("piece", "<u4"),
            ("place", "<u8"),
            ("size", "<u4"),
        ]
    )

    def __init__(self, rows: Array) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Fates:
        return Fates(self.rows[part])


def fates_path(out: Path, piece: int) -> Path:
    """The file of a piece."""
    return out / f"piece-{piece:06d}.fates"


def write_fates(path: Path, parts: Iterator[Fates]) -> None:
    """One file of all parts, there whole or not at all."""
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with open(draft, "wb") as file:
        for part in parts:
            file.write(part.rows.tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def read_fates(path: Path) -> Fates:
    """Of a piece, mapped. Raises UserError where the file is missing or cut."""
    size = Fates.DTYPE.itemsize
    if not path.is_file() or path.stat().st_size % size:
        raise UserError(f"{path}: no whole file of fates; remove its folder to find the duplicates anew.")
    if not path.stat().st_size:
        return Fates(np.zeros(0, Fates.DTYPE))
    return Fates(np.memmap(path, Fates.DTYPE, "r"))
