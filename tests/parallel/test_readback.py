"""Nothing is read back from the device between two logged steps, under any engine.

To read a value back (`.item()`, `if tensor:`, a shape that depends on values) is to wait for all that the device was given
to do. On a CPU the same operators are called, so they can be counted here.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.grid import Grid
from parallel.layout import Layout
from tests.distributed import run_ranks
from tests.training import start_run, write_config

aten = torch.ops.aten
# What waits for a GPU: a value as a Python number, and results whose shape depends on values.
READING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.equal,
    aten.repeat_interleave,
}
LOGGED = 3  # every so many steps


class Reads(TorchDispatchMode):
    """The operators that read back while it is active, but for sums of what only the hosts know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.on_host = False
        self.patches = [
            mock.patch.object(torch.Tensor, "tolist", self._counted(torch.Tensor.tolist)),
            mock.patch.object(Grid, "total_on_host", self._allowed(Grid.total_on_host)),
        ]

    def __enter__(self) -> Any:
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for patch in self.patches:
            patch.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        indices = [i for i in args[1] if i is not None] if packet in (aten.index, aten.index_put_) else []
        if packet in READING or any(index.dtype == torch.bool for index in indices):
            self._count(str(packet))
        return function(*args, **(kwargs or {}))

    def _count(self, what: str) -> None:
        if not self.on_host:
            self.found.append(what)

    def _counted(self, function: Any) -> Any:
        def tolist(tensor: torch.Tensor) -> Any:
            self._count("tolist")
            return function(tensor)

        return tolist

    def _allowed(self, function: Any) -> Any:
        def total(*args: Any) -> Any:
            self.on_host = True
            try:
                return function(*args)
            finally:
                self.on_host = False

        return total


def reads_of_steps(config_path: str, overrides: list[str]) -> list[list[str]]:
    """What each step of training reads back, the batch and the report with it."""
    run = start_run(config_path, overrides)
    steps, found = run.data(), []
    for _ in range(2 * LOGGED):
        with Reads() as reads:
            data = next(steps)
            loss = run.forward_backward(data)
            update = run.update()
            run.advance(data, update)
            run.log(data, loss, update)
            assert not run.ending(data.stop)
        found.append(reads.found)
    steps.close()
    return found


@pytest.mark.parametrize(
    ("layout", "compute"),
    [
        ("", "fp32"),
        ("dp=2", "bf16"),
        ("dp=2,zero=1", "fp32"),
        ("dp=2,zero=1", "bf16"),
        ("dp=2,zero=2", "bf16"),
        ("dp=2,zero=3", "bf16"),
        ("tp=2,sp,dp=2,zero=3", "fp32"),
        ("cp=2,pp=2,vp=2,zero=1", "fp32"),
    ],
)
def test_only_a_logged_step_reads_a_value_back(tmp_path: Path, tiny_data: Path, layout: str, compute: str) -> None:
    wanted = Layout.parse(layout)
    axes = ("tensor", "sequence", "context", "pipeline", "virtual", "zero")
    parallel = [f"parallel.{axis}={str(getattr(wanted, axis)).lower()}" for axis in axes]
    options = [*parallel, f"precision.compute={compute}", f"monitor.log_every={LOGGED} steps", "batch.size=4"]
    config = write_config(tmp_path, tiny_data)
    for steps in run_ranks(wanted.size, reads_of_steps, str(config), [*options, "monitor.validate_every=null"]):
        logged, others = steps[LOGGED - 1 :: LOGGED], [step for n, step in enumerate(steps, 1) if n % LOGGED]
        assert all(logged), "the count sees what the report reads"
        if wanted.zero == 3:  # in its first step DeepSpeed compares over the ranks in which order modules are used
            assert others.pop(0)
        assert not any(others), others
