"""Relative position biases: T5's buckets, attention with them against the definition and transformers, and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from kernels import attention as module
from kernels.attention import attention
from kernels.noise import sample_keys
from kernels.relative import by_distance, by_place, t5_buckets
from tests.kernels.dense import PACKED, Shape, assert_equals_dense, close, dense, gradients, tensors
from tests.kernels.test_attention import kept

EDGES = t5_buckets(8, 20)[0]
SITE = 9  # of `kept`


def table(heads: int, edges: Tensor = EDGES, dtype: torch.dtype = torch.float64) -> Tensor:
    """(N, I)"""
    generator = torch.Generator().manual_seed(heads + len(edges))
    return torch.randn(heads, len(edges) + 1, generator=generator, dtype=torch.float64).to(dtype)


# -- buckets -------------------------------------------------------------------------------------------------------

TABLES = [(32, 128), (32, 20), (64, 256), (16, 64), (8, 20), (8, 27), (12, 81), (31, 100), (48, 1000), (4, 5000)]


@pytest.mark.parametrize(("num_buckets", "max_distance"), TABLES)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    distances = torch.arange(-6000, 6001)
    edges, order = t5_buckets(num_buckets, max_distance, bidirectional)
    found = order[(distances[:, None] >= edges).sum(1)]
    expected = T5Attention._relative_position_bucket(distances, bidirectional, num_buckets, max_distance)
    assert found.equal(expected)
    assert edges.dtype == torch.int32
    assert (edges[1:] > edges[:-1]).all()
    assert len(set(order.tolist())) == len(order) == len(edges) + 1


def test_there_are_as_many_buckets_as_said() -> None:
    assert len(t5_buckets(32, 128, bidirectional=True)[1]) == 31
    assert len(t5_buckets(32, 128, bidirectional=False)[1]) == 32


@pytest.mark.parametrize("arguments", [(3, 128, True), (1, 128, False), (32, 8, True), (32, 16, False)])
def test_buckets_that_t5_has_not_are_told(arguments: tuple[int, int, bool]) -> None:
    with pytest.raises(ValueError, match="max_distance above"):
        t5_buckets(*arguments)


# -- against the definition ----------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [{}, {"causal": False}, {"window": 9}, {"causal": False, "window": 30, "softcap": 0.7}]


@pytest.mark.parametrize("length", [1, 5, 64, 65, 130, 257])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_dense_attention_around_the_block_sizes(length: int, options: dict[str, Any]) -> None:
    assert_equals_dense(Shape(length, length, heads=2, groups=1), bias=table(2), edges=EDGES, **options)


@pytest.mark.parametrize("edges", [[], [0], [1], [-70, 3], [-500, -2, -1, 7, 7, 90, 4000]])
def test_any_ascending_edges_will_do(edges: list[int]) -> None:
    """Buckets of no distance, of all, and of none that occurs."""
    made = torch.tensor(edges, dtype=torch.int32)
    assert_equals_dense(Shape(70, 70), bias=table(4, made), edges=made, causal=False)


@pytest.mark.parametrize(
    ("queries", "keys", "first"), [(1, 90, 89), (3, 90, 87), (70, 90, 20), (70, 200, 20), (90, 70, 0)]
)
@pytest.mark.parametrize("options", OPTIONS)
def test_distances_are_of_places_among_the_keys(queries: int, keys: int, first: int, options: dict[str, Any]) -> None:
    assert_equals_dense(Shape(queries, keys), bias=table(4), edges=EDGES, first_query=first, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_documents_change_no_distance(options: dict[str, Any]) -> None:
    same = PACKED[:, :, None] == PACKED[:, None, :]
    biased = {"bias": table(4), "edges": EDGES, "documents": PACKED}
    assert_equals_dense(Shape(130, 130, groups=2), same=same, **biased, **options)
    assert_equals_dense(Shape(30, 130, groups=2), first_query=100, same=same[:, 100:], **biased, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_with_dropout(options: dict[str, Any]) -> None:
    bias = table(4).requires_grad_()
    inputs = (*tensors(Shape(130, 130, groups=2)), bias)
    keys = sample_keys(5, torch.tensor([3, 11]))  # those of `kept`
    out = attention(*inputs[:3], bias=bias, edges=EDGES, dropout=0.3, keys=keys, site=SITE, **options)
    expected = dense(*inputs[:3], bias=bias, edges=EDGES, keep=kept(4, 130, 130, 0.3), dropout=0.3, **options)
    close(out, expected, 1e-11)
    for found, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        close(found, wanted, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_float32_whatever_the_type(dtype: torch.dtype) -> None:
    tolerance = 3e-6 if dtype == torch.float32 else 3e-2
    assert_equals_dense(Shape(140, 140, groups=2), dtype, tolerance, bias=table(4), edges=EDGES, causal=False)


def test_queries_that_see_no_key_have_gradient_zero() -> None:
    shape, options = Shape(70, 20), {"causal": False, "window": 4, "first_query": 30}
    bias = table(4).requires_grad_()
    inputs = (*tensors(shape), bias)
    out = attention(*inputs[:3], bias=bias, edges=EDGES, **options)
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients(out, inputs))
    assert_equals_dense(shape, bias=table(4), edges=EDGES, **{**options, "first_query": 18})


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*OPTIONS, {"first_query": 3, "causal": False}])
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    edges = torch.tensor([-3, 0, 1, 2], dtype=torch.int32)
    q, k, v = tensors(Shape(7, 9, batch=1, groups=2, size=3))
    bias = table(4, edges).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: attention(q, k, v, bias=b, edges=edges, **options), (q, k, v, bias)
    )


def test_the_table_by_distance_and_the_distances_by_place_have_right_gradients() -> None:
    bias = table(3).requires_grad_()
    values = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: by_distance(x, EDGES, -25, 50), bias)
    for queries in (1, 4, 11):
        assert torch.autograd.gradcheck(lambda x, s=queries: by_place(x, s), values)


@pytest.fixture
def four_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


def test_twice_the_same_is_bitwise_the_same_with_several_threads(four_threads: None) -> None:
    """Sums that threads race for differ here within a few tries: the gradient of an indexed table did."""
    inputs = (*tensors(Shape(300, 300), torch.float32), table(4, dtype=torch.float32).requires_grad_())
    runs = [gradients(attention(*inputs[:3], bias=inputs[3], edges=EDGES), inputs) for _ in range(10)]
    assert all(a.equal(b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.thorough
def test_compiled_attention_is_the_eager_one_and_bitwise_the_same_twice(four_threads: None) -> None:
    def everything(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias=bias, edges=EDGES, window=30)

    inputs = (
        *tensors(Shape(40, 40, groups=2, size=16), torch.float32),
        table(4, dtype=torch.float32).requires_grad_(),
    )
    torch.compiler.reset()
    compiled = torch.compile(everything, dynamic=False, fullgraph=True)
    expected, found = everything(*inputs), compiled(*inputs)
    close(found, expected, 3e-6)
    first = gradients(found, inputs)
    for ours, theirs in zip(first, gradients(expected, inputs), strict=True):
        close(ours, theirs, 1e-5)
    for _ in range(5):
        assert all(a.equal(b) for a, b in zip(first, gradients(compiled(*inputs), inputs), strict=True))


# -- against transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("length", [40, 200])
def test_it_is_the_attention_of_t5(bidirectional: bool, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and every gradient, of T5's table too; T5 has no scale. Its softmax, float32 whatever the type, is made
    float64 here, but not its buckets."""
    config = T5Config(d_model=24, d_kv=6, num_heads=4, dropout_rate=0.0, is_decoder=not bidirectional)
    torch.manual_seed(3)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in theirs.named_parameters()}
    x = torch.randn(2, length, 24, dtype=torch.float64)
    added = theirs.compute_bias(length, length)
    if not bidirectional:
        added = added.masked_fill(torch.ones(length, length).triu(1).bool(), torch.finfo(torch.float64).min)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        expected = theirs(x, position_bias=added)[0]
    q, k, v = ((x @ weights[f"{name}.weight"].T).view(2, length, 4, 6) for name in "qkv")
    edges, order = t5_buckets(bidirectional=bidirectional)
    bias = weights["relative_attention_bias.weight"][order].T
    out = attention(q, k, v, causal=not bidirectional, scale=1.0, bias=bias, edges=edges)
    out = out.reshape(2, length, 24) @ weights["o.weight"].T
    close(out, expected, 1e-11)
    wanted = gradients(expected, tuple(theirs.parameters()))
    for found, right, name in zip(gradients(out, tuple(weights.values())), wanted, weights, strict=True):
        close(found, right, 1e-11, name)
        assert right.abs().max() > 0, name


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": table(4)}, "needs both"),
        ({"edges": EDGES}, "needs both"),
        ({"bias": table(3), "edges": EDGES}, r"N = 4 heads are needed, found \(3, 7\) and \(6,\)"),
        ({"bias": table(4), "edges": EDGES[1:]}, r"found \(4, 7\) and \(5,\)"),
        ({"bias": table(4)[0], "edges": EDGES}, "are needed"),
        ({"bias": table(4), "edges": EDGES.long()}, "int32"),
        ({"bias": table(4), "edges": EDGES, "slopes": torch.ones(4)}, "not both"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention(*tensors(Shape(4, 4)), **options)


# -- planted faults ------------------------------------------------------------------------------------------------


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        assert_equals_dense(Shape(70, 70, heads=2, groups=1), bias=table(2), edges=EDGES, causal=False)

    faults = {
        "an edge off by one": ("by_distance", lambda bias, edges, *a: by_distance(bias, edges + (edges == 2), *a)),
        "the bias of another head": ("by_distance", lambda bias, *a: by_distance(bias.flip(0), *a)),
        "distances mirrored": ("by_place", lambda values, queries: by_place(values.flip(1), queries)),
    }
    check()
    for function, fault in faults.values():
        with monkeypatch.context() as patch:
            patch.setattr(module, function, fault)
            with pytest.raises(AssertionError, match="of"):
                check()
