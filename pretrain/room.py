"""A disk without room pauses what is written to it, never the training.

A checkpoint that cannot be written is given up and tried again (`Pause`); lines of metrics wait in memory
(`pretrain.metrics`); TensorBoard's writer, whose thread dies of the error, is made anew (`Lasting`).
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
FIRST_RETRY, LAST_RETRY = 60.0, 600.0  # seconds: each failed try doubles the wait for the next


class Pause:
    """Between a failure and its next try. It ends with `over`."""

    def __init__(self) -> None:
        self.wait, self.next = 0.0, 0.0

    def __bool__(self) -> bool:
        """Whether something failed and has not succeeded since."""
        return self.wait > 0

    def begin(self) -> None:
        """It failed, maybe again."""
        self.wait = min(2 * self.wait, LAST_RETRY) or FIRST_RETRY
        self.next = time.monotonic() + self.wait

    def over(self) -> None:
        self.wait = 0.0

    def has_passed(self) -> bool:
        return bool(self) and time.monotonic() >= self.next


def has_room(folder: Path, needed: int) -> bool:
    """Whether so many bytes are free; what cannot be asked may have it."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free >= needed
    return True


class Lasting:
    """Stands for a writer that its disk may fail: has its methods, which then do nothing until it could be made again.

    make: the writer, for a run that stands at a step. A first argument that is a number is the step that a call is of.
    """

    def __init__(self, make: Callable[[int], Any], step: int, warn: Callable[[str], None], name: str) -> None:
        self._make, self._warn, self._name, self._step = make, warn, name, step
        self._pause = Pause()
        self._writer: Any = make(step)

    def __getattr__(self, method: str) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            if args and isinstance(args[0], int):
                self._step = args[0]
            if self._writer is None and self._pause.has_passed():
                self._again()
            if self._writer is not None:
                with self._failing():
                    getattr(self._writer, method)(*args, **options)

        return call

    def _again(self) -> None:
        with self._failing():
            self._writer = self._make(self._step)
            self._pause.over()
            self._warn(
                f"step {self._step:,}: {self._name} is written again; what was reported meanwhile is missing there"
            )

    @contextlib.contextmanager
    def _failing(self) -> Any:
        try:
            yield
        except OSError as error:
            if not self._pause:
                self._warn(f"{self._name} cannot be written: {error}; the training goes on without until there is room")
            self._pause.begin()
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                if writer is not None:
                    writer.close(ended=False)
