"""The look-up is torch's, and its gradient the same bits every time, compiled and on several threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels.embedding import embedding
from tests.distributed import REPOSITORY

ROWS, WIDTH = 40, 24


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_torchs_own_look_up_and_gradient(dtype: torch.dtype) -> None:
    table = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    ids, grad = torch.randint(ROWS, (3, 50)), torch.randn(3, 50, WIDTH, dtype=dtype)
    found, wanted = embedding(ids, table), F.embedding(ids, table)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(out, table, grad)[0] for out in (found, wanted)))


def test_the_operator_is_described_rightly() -> None:
    torch.library.opcheck(
        torch.ops.kernels.embedding_gradient.default, (torch.randn(2, 9, WIDTH), torch.randint(ROWS, (2, 9)), ROWS)
    )


REPEATED = """
import torch
from kernels.embedding import embedding
torch.manual_seed(0)
ids, grad = torch.randint(40, (8, 4096)), torch.randn(8, 4096, 24)
table = torch.randn(40, 24, requires_grad=True)
compiled = torch.compile(lambda ids, table: embedding(ids, table) * 2.0, fullgraph=True)
found = [torch.autograd.grad(compiled(ids, table), table, grad)[0] for _ in range(20)]
assert torch.get_num_threads() == 2
print(all(torch.equal(found[0], other) for other in found))
"""


@pytest.mark.thorough
def test_compiled_on_two_threads_the_gradient_is_bitwise_the_same_every_time() -> None:
    """With F.embedding in its place this prints False: the compiler's own gradient adds up by racing threads."""
    command = [sys.executable, "-c", REPEATED]
    result = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "2"}, cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert result.stdout == "True\n", result.stdout + result.stderr
