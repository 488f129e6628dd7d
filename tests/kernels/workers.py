"""Two processes with Triton: one interprets kernels on the CPU, the other compiles them for GPUs that are not there.

Triton decides which when it is first imported, so they cannot be one, nor the tests' own. Each is started by its first use
and dies with the tests.

    interpret(errors, setting)      # a function at the top of a module; what it takes and returns is pickled
    compile_offline(compile_case, case)
    compiled_once(request.config.cache, sources, compile_case, case)    # unless the sources are as they were
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any, TypeVar
from unittest import mock

from tests.distributed import REPOSITORY, die_with_parent

T = TypeVar("T")
_pools: dict[bool, ProcessPoolExecutor] = {}


def interpret(function: Callable[..., T], *args: Any, timeout: float = 120) -> T:
    """`function(*args)` where kernels are interpreted; its exception is raised here."""
    return _run(True, function, args, timeout)


def compile_offline(function: Callable[..., T], *args: Any, timeout: float = 300) -> T:
    """`function(*args)` where kernels are compiled."""
    return _run(False, function, args, timeout)


def compiled_once(cache: Any, sources: Sequence[str], function: Callable[..., T], case: Any) -> T:
    """`compile_offline(function, case)`, kept in pytest's cache under a hash of the sources (patterns of paths) that it
    depends on, so that only a change compiles again."""
    digest = hashlib.sha256(version("triton").encode())
    for path in sorted(path for pattern in sources for path in REPOSITORY.glob(pattern)):
        digest.update(path.read_bytes())
    name = f"kernels/{case}".replace(" ", "-")
    kept = cache.get(name, None)
    if kept is None or kept[0] != digest.hexdigest():
        kept = [digest.hexdigest(), compile_offline(function, case)]
        cache.set(name, kept)
    return kept[1]  # type: ignore[no-any-return]


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
