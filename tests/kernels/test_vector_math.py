"""A process's first cosine is its second, whatever the threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.distributed import REPOSITORY

FIRST_CALLS = """
import os, torch
from kernels.vector_math import settle
torch.set_num_threads(16)
x = torch.linspace(0.1, 5.0, 16 * 2048)
bad = 0
for name in ("cos", "log", "exp", "sin") * 150:
    child = os.fork()
    if child == 0:
        settle()
        y = x * 2.0  # the threads are there
        function = getattr(torch, name)
        os._exit(not torch.equal(function(x), function(x)))
    bad += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(bad)
"""


@pytest.mark.thorough
def test_the_first_call_by_many_threads_is_as_exact_as_the_second() -> None:
    """Without `settle` about 3 of 1,000 such processes get a first result that is off by 1e-4 (MKL 2024.2)."""
    command = [sys.executable, "-c", FIRST_CALLS]
    result = subprocess.run(command, cwd=REPOSITORY, env={**os.environ}, capture_output=True, text=True, timeout=300)
    assert result.stdout == "0\n", result.stdout + result.stderr
