"""Seeing this process's collectives and exchanges from outside: every call that issues one or waits for one.

torch.distributed, megatron-core and DeepSpeed all reach the wire through the methods of a process group, and wait through
the `Work` that these return. torch's own profiler names the first, but not the waiting, which on a CPU is most of it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch._C._distributed_c10d import ProcessGroup, Work

METHODS = re.compile(r"_?(all|reduce|broadcast|gather|scatter|send|recv|barrier|monitored)\w*")
Around = Callable[[str], AbstractContextManager[Any]]  # name of the process group -> what the call is made within


class Watch:
    """While entered, each such call of this process is made within `around(name of its group)`; nested ones count once."""

    def __init__(self, around: Around) -> None:
        self.around = around
        self.groups: dict[int, str] = {}  # id of the last Work at that address -> name of its group
        self.local = threading.local()
        self.originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Watch:
        for name in filter(METHODS.fullmatch, list(vars(ProcessGroup))):
            self._replace(ProcessGroup, name, self._issuing)
        self._replace(Work, "wait", self._waiting)
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, original in self.originals:
            setattr(owner, name, original)
        self.originals.clear()

    def _replace(self, owner: Any, name: str, watched: Callable[[Any], Any]) -> None:
        self.originals.append(
            (owner, name, vars(owner)[name])
        )  # as it lies there: what getattr gives is not bound again
        setattr(owner, name, watched(getattr(owner, name)))

    def _issuing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **options: Any) -> Any:
            work = self._within(group.group_name, method, group, *args, **options)
            if work is not None:
                self.groups[id(work)] = group.group_name
            return work

        return call

    def _waiting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(work: Any, *args: Any, **options: Any) -> Any:
            return self._within(self.groups.get(id(work), ""), method, work, *args, **options)

        return call

    def _within(self, group: str, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if getattr(self.local, "inside", False):
            return method(*args, **options)
        self.local.inside = True
        try:
            with self.around(group):
                return method(*args, **options)
        finally:
            self.local.inside = False
