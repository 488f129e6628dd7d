"""Attention over ranks that share each sequence is the attention of one process, forward and backward."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.attention import alibi_slopes, attention
from kernels.noise import sample_keys
from kernels.relative import t5_buckets
from parallel.context import exchanged_attention
from parallel.grid import start_grid
from parallel.layout import Layout, rank_and_world
from tests.distributed import run_ranks

B, S, N, D = 2, 16, 8, 6
# Runs of equal numbers, over the boundaries of the ranks' slices too, and one number that comes again.
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 7 + [2] + [3] * 5, [4] * 9 + [5] * 5 + [4] * 2], dtype=torch.int32)


class Case(NamedTuple):
    causal: bool
    documents: bool
    groups: int
    window: int | None
    slopes: bool
    dropout: float

    def options(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "documents": DOCUMENTS if self.documents else None,
            "window": self.window,
            "slopes": alibi_slopes(N) if self.slopes else None,
            "dropout": self.dropout,
            "keys": sample_keys(1, torch.tensor([3, 4])),
            "site": 9,
        }


CASES = [
    Case(causal, documents, groups, window, slopes=groups == 8, dropout=dropout)
    for (causal, documents), (groups, window, dropout) in itertools.product(
        itertools.product((True, False), (True, False)), ((8, None, 0.0), (2, 5, 0.0), (1, None, 0.2))
    )
]


def inputs(case: Case) -> list[Tensor]:
    """q, k, v and the gradient of the output, whole, float64."""
    generator = torch.Generator().manual_seed(7)
    heads = (N, case.groups, case.groups, N)
    return [torch.randn(B, S, count, D, generator=generator, dtype=torch.float64) for count in heads]


def shared() -> list[list[Tensor]]:
    """Output and gradients of this rank's slice, of each case."""
    axis, results = start_grid(Layout(context=rank_and_world()[1]), 60).context, []
    for case in CASES:
        q, k, v, above = (x.chunk(axis.size, dim=1)[axis.rank].contiguous() for x in inputs(case))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = exchanged_attention(*leaves, axis, **case.options())
        out.backward(above)
        results.append([out.detach(), *(x.grad for x in leaves)])  # type: ignore[list-item]
    return results


@pytest.fixture(scope="module")
def expected() -> list[list[Tensor]]:
    results = []
    for case in CASES:
        q, k, v, above = inputs(case)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, **case.options())
        out.backward(above)
        results.append([out.detach(), *(x.grad for x in leaves)])
    return results  # type: ignore[return-value]


@pytest.mark.parametrize("ranks", [2, 4])
def test_it_is_the_attention_of_one_process_forward_and_backward(ranks: int, expected: list[list[Tensor]]) -> None:
    slices = run_ranks(ranks, shared)
    for number, (case, whole) in enumerate(zip(CASES, expected, strict=True)):
        for position, name in enumerate(("output", "gradient of q", "gradient of k", "gradient of v")):
            found = torch.cat([results[number][position] for results in slices], dim=1)
            assert torch.allclose(found, whole[position], rtol=1e-10, atol=1e-12), f"{case}: {name}"


# -- relative biases -----------------------------------------------------------------------------------------------

EDGES = t5_buckets(8, 12)[0]
BIASED = [Case(causal, True, groups, None, False, 0.2) for causal, groups in ((True, 8), (False, 2))]


def table() -> Tensor:
    """(N, I)"""
    return torch.randn(N, len(EDGES) + 1, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def shared_bias() -> list[list[Tensor]]:
    """Output and gradient of q of this rank's slice, and of the table, of each case."""
    axis, results = start_grid(Layout(context=rank_and_world()[1]), 60).context, []
    for case in BIASED:
        q, k, v, above = (x.chunk(axis.size, dim=1)[axis.rank].contiguous() for x in inputs(case))
        bias = table().requires_grad_()
        out = exchanged_attention(q.requires_grad_(), k, v, axis, bias=bias, edges=EDGES, **case.options())
        results.append([out.detach(), *torch.autograd.grad(out, (q, bias), above)])
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_bias_goes_with_its_head_and_each_rank_has_its_heads_gradient(ranks: int) -> None:
    slices = run_ranks(ranks, shared_bias)
    for number, case in enumerate(BIASED):
        q, k, v, above = inputs(case)
        bias = table().requires_grad_()
        out = attention(q.requires_grad_(), k, v, bias=bias, edges=EDGES, **case.options())
        whole = (out.detach(), *torch.autograd.grad(out, (q, bias), above))
        for position, name in enumerate(("output", "gradient of q")):
            found = torch.cat([results[number][position] for results in slices], dim=1)
            assert torch.allclose(found, whole[position], rtol=1e-10, atol=1e-12), f"{case}: {name}"
        tables = [results[number][2] for results in slices]
        assert torch.allclose(torch.stack(tables).sum(0), whole[2], rtol=1e-10, atol=1e-12), case
        for rank, found in enumerate(tables):
            own = slice(rank * N // ranks, (rank + 1) * N // ranks)
            others = torch.ones(N, dtype=torch.bool)
            others[own] = False
            assert not found[others].any(), case
            assert found[own].any(), case


def test_documents_and_directions_differ(expected: list[list[Tensor]]) -> None:
    """Or the cases above would prove less than they seem to."""
    outputs = [results[0] for case, results in zip(CASES, expected, strict=True) if case.groups == 2]
    assert all(not torch.allclose(one, other) for one, other in itertools.combinations(outputs, 2))
