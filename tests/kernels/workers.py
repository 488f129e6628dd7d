"""Two processes with Triton: one interprets kernels on the CPU, the other compiles them for GPUs that are not there.

Triton decides which when it is first imported, so they cannot be one, nor the tests' own. Each is started by its first use
and dies with the tests.

    interpret(errors, setting)      # a function at the top of a module; what it takes and returns is pickled
    compile_offline(compile_case, case)
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
_pools: dict[bool, ProcessPoolExecutor] = {}


def interpret(function: Callable[..., T], *args: Any, timeout: float = 120) -> T:
    """`function(*args)` where kernels are interpreted; its exception is raised here."""
    return _run(True, function, args, timeout)


def compile_offline(function: Callable[..., T], *args: Any, timeout: float = 300) -> T:
    """`function(*args)` where kernels are compiled."""
    return _run(False, function, args, timeout)


def _run(interpreted: bool, function: Callable[..., T], args: tuple[Any, ...], timeout: float) -> T:
    with mock.patch.dict(os.environ):  # a new process takes the variable with it
        os.environ.pop("TRITON_INTERPRET", None)
        if interpreted:
            os.environ["TRITON_INTERPRET"] = "1"
        if interpreted not in _pools:
            context = multiprocessing.get_context("spawn")
            _pools[interpreted] = ProcessPoolExecutor(1, context, initializer=_begin)
        future = _pools[interpreted].submit(function, *args)
    return future.result(timeout)


def _begin() -> None:
    die_with_parent()
    import numpy
    import torch

    torch.set_num_threads(1)
    numpy.seterr(all="ignore")  # interpreted integers wrap and exponentials overflow, as on a GPU
