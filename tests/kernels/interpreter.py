"""One process in which Triton interprets kernels on the CPU instead of compiling them.

Triton decides that when it is first imported, so it must be another process than one that compiles. It is started by the
first use and dies with the tests. Its bfloat16 products are silently wrong: `interpret` refuses such tensors, and so do
the product's own entry points.

    interpret(errors, setting)      # errors: a function at the top of a module; what it takes and returns is pickled
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar
from unittest import mock

from tests.distributed import die_with_parent

T = TypeVar("T")
_pool: list[ProcessPoolExecutor] = []


def interpret(function: Callable[..., T], *args: Any, timeout: float = 120) -> T:
    """`function(*args)` in that process; its exception is raised here."""
    if not _pool:
        with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
            _pool.append(ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin))
            return _pool[0].submit(function, *args).result(timeout)
    return _pool[0].submit(function, *args).result(timeout)


def _begin() -> None:
    die_with_parent()
    import torch

    torch.set_num_threads(1)
    import numpy

    numpy.seterr(all="ignore")  # integer products wrap, as on a GPU; exp overflows where the result is not selected
