"""Where a thread is: the collective that it waits in, and its Python stack, for the message of a run that hangs."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NamedTuple

MAIN_FRAMES, OTHER_FRAMES = 25, 8  # of the innermost, that are shown
OUR_THREADS = ("checkpoint", "prefetch")  # that a main thread may wait for

Lines = list[tuple[FrameType, int]]  # frames with their line, outermost first


class Inside(NamedTuple):
    """What a thread is in: a collective, or none, and the function that called it."""

    collective: str
    function: str

    def __str__(self) -> str:
        """`all_reduce in average`, `in wait`"""
        return " in ".join(filter(None, [self.collective, self.function])) if self.collective else f"in {self.function}"


def inside(lines: Lines) -> Inside:
    """Of a stack."""
    caller = ""
    for frame, _ in lines:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if name == "wrapper" or "/deepspeed/comm/" in file or file.endswith("parallel/collectives.py"):  # only pass on
            continue
        if "/torch/distributed/" in file or file.endswith("p2p_communication.py"):
            return Inside(name, caller)
        caller = name
    return Inside("", caller)


def main_thread() -> Lines:
    """Where the main thread is now."""
    return _of_thread(threading.main_thread())


def of_error(raised: TracebackType | None) -> Lines:
    """Where an error was raised, which has unwound the stack since."""
    lines: Lines = []
    while raised is not None:
        lines.append((raised.tb_frame, raised.tb_lineno))
        raised = raised.tb_next
    return lines


def told(main: Lines) -> Iterator[str]:
    """The stack of the main thread, and of those of ours that it may wait for, as Python prints them."""
    yield "its main thread, the innermost call last:"
    yield from _format(main[-MAIN_FRAMES:])
    for thread in threading.enumerate():
        if thread.name in OUR_THREADS and (lines := _of_thread(thread)):
            yield f"its thread that is called {thread.name}:"
            yield from _format(lines[-OTHER_FRAMES:])


def _of_thread(thread: threading.Thread) -> Lines:
    frame = sys._current_frames().get(thread.ident or 0)
    return [(frame, line) for frame, line in traceback.walk_stack(frame)][::-1] if frame is not None else []


def _format(lines: Lines) -> Iterator[str]:
    for entry in traceback.StackSummary.extract(iter(lines)).format():
        yield from entry.rstrip("\n").splitlines()
