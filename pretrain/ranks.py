"""Ranks on this machine for a command's own use: forked from one warm process, a call each, watched together.

The warm process (multiprocessing's fork server) imports the heavy libraries once, so that starting eight ranks takes no
longer than starting one. It never touches a device, and so may be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from parallel.ports import free_port

WARM = ["pretrain.warm", "pretrain.train"]
TAIL = 2000  # characters of a failed rank's output that are told


class RankFailed(Exception):
    """A rank raised, died or ran out of time; the message says which, with the end of its output."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, folder: Path, timeout: float) -> Any:
    """Rank 0's result of `function(*args)` in `world` processes with torch.distributed's environment.

    What the ranks print goes to files in `folder`. Raises RankFailed when one fails; the others are killed then.
    """
    context = multiprocessing.get_context("forkserver")
    with _environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):  # counting the devices must not touch one before the fork
        context.set_forkserver_preload(WARM)
        port = free_port()
        ranks = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
            process = context.Process(
                target=_be_rank, args=(theirs, place, folder / f"rank-{rank}.log", function, args), daemon=True
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
    try:
        return _collect(ranks, folder, timeout)
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def _collect(ranks: list[Any], folder: Path, timeout: float) -> Any:
    """Rank 0's result when all have theirs."""
    results: dict[int, Any] = {}
    waiting: dict[Connection, int] = {ours: rank for rank, (_, ours) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout)
        if not ready:
            raise RankFailed(f"no rank answered for {timeout:.0f} seconds; waiting for {sorted(waiting.values())}")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                succeeded, results[rank] = connection.recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died\n{_end_of(folder, rank)}") from None
            if not succeeded:
                raise RankFailed(f"rank {rank}: {results[rank]}\n{_end_of(folder, rank)}")
    return results[0]


def _end_of(folder: Path, rank: int) -> str:
    path = folder / f"rank-{rank}.log"
    return path.read_text(errors="replace")[-TAIL:] if path.exists() else ""


def _be_rank(connection: Connection, place: dict[str, str], log: Path, function: Callable[..., Any], args: Any) -> None:
    import torch

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(place, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(place["WORLD_SIZE"])))
    try:
        result = function(*args)
        connection.send((True, result if place["RANK"] == "0" else None))
        torch.distributed.barrier()  # rank 0 serves the others' rendezvous: none leaves before all are done
    except BaseException as error:
        traceback.print_exc()
        connection.send((False, f"{type(error).__name__}: {error}"))


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
