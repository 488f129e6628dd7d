"""Rows of a table by number, whose gradient has one order of summation.

torch.compile's own gradient of a look-up adds rows up by racing threads, so that two runs of a model differ in the last bits
and a resume is not exact. Here it is torch's eager one, behind an operator that the compiler does not look into.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """(..., H) rows of table (V, H) at ids (...), int64."""
    return _Embedding.apply(ids, table)  # type: ignore[no-any-return]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.rows = table.shape[0]
        ctx.save_for_backward(ids)
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, torch.ops.kernels.embedding_gradient(grads[0], ids, ctx.rows)


@torch.library.custom_op("kernels::embedding_gradient", mutates_args=())
def gradient(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """(V, H) sums of grad (..., H) over the places with the same id."""
    return torch.ops.aten.embedding_dense_backward(grad, ids, rows, -1, False)


@gradient.register_fake
def _(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.shape[-1])
