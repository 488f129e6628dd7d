"""Attention against a dense float64 reference, forward and backward; and its dropout, cache and head coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention as module
from kernels.attention import alibi_slopes, attention
from kernels.documents import document_ids
from kernels.noise import keep_mask, sample_keys, split_keys
from tests.kernels.dense import (
    PACKED,
    Shape,
    assert_equals_dense,
    close,
    dense,
    documents_of,
    gradients,
    tensors,
    visible_places,
)

SITE = 9


@pytest.fixture(params=["library", "blocks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of computing plain attention, whatever would be chosen for its shape."""
    monkeypatch.setattr(module, "_library_is_faster", lambda q: request.param == "library")


# Around the 64 queries a block at least, and the quarters that a longer sequence is cut into.
LENGTHS = [1, 5, 63, 64, 65, 130, 257, 301]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_dense_attention_around_the_block_sizes(length: int, causal: bool, path: None) -> None:
    assert_equals_dense(Shape(length, length, batch=1, heads=2, groups=2), causal=causal)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_read_the_key_head_of_their_group(groups: int, causal: bool, path: None) -> None:
    assert_equals_dense(Shape(70, 70, heads=6, groups=groups), causal=causal)
    assert_equals_dense(Shape(70, 70, heads=6, groups=groups), causal=causal, window=9, slopes=torch.rand(6))


@pytest.mark.parametrize("length", [65, 257])
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 256, 257, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_window_is_the_places_less_than_that_far_away(length: int, window: int, causal: bool) -> None:
    assert_equals_dense(Shape(length, length, batch=1, heads=2, groups=1), causal=causal, window=window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 11])
def test_alibi_subtracts_slope_times_distance(causal: bool, window: int | None) -> None:
    shape = Shape(130, 130, groups=2)
    assert_equals_dense(shape, causal=causal, window=window, slopes=alibi_slopes(4))


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_scale_multiplies_the_scores(scale: float, path: None) -> None:
    assert_equals_dense(Shape(66, 66), scale=scale)


@pytest.mark.parametrize(
    ("queries", "keys", "first"),
    [(1, 1, 0), (1, 90, 89), (3, 90, 87), (70, 90, 20), (70, 200, 20), (70, 90, 0), (90, 70, 0)],
)
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"slopes": torch.tensor([0.5, 0.1, 0.0, 2.0])}])
def test_queries_after_a_cache_stand_at_first_query(
    queries: int, keys: int, first: int, options: dict[str, Any], path: None
) -> None:
    assert_equals_dense(Shape(queries, keys), first_query=first, **options)
    assert_equals_dense(Shape(queries, keys), first_query=first, causal=False, **options)


@pytest.mark.parametrize("first", [0, 1, 30, 97])
def test_a_cache_changes_nothing(first: int) -> None:
    q, k, v = tensors(Shape(98, 98, groups=2))
    for options in ({}, {"window": 40}, {"slopes": alibi_slopes(4)}):
        whole = attention(q, k, v, **options)
        late = attention(q[:, first:], k, v, first_query=first, **options)
        early = attention(q[:, :first], k[:, :first], v[:, :first], **options) if first else whole[:, :0]
        close(torch.cat((early, late), dim=1), whole, 1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first", [18, 23, 200])
def test_a_query_that_sees_no_key_gives_zero_and_has_gradient_zero(causal: bool, first: int) -> None:
    shape, options = Shape(70, 20), {"causal": causal, "window": 4, "first_query": first}
    assert_equals_dense(shape, **options)
    q, k, v = tensors(shape)
    out = attention(q, k, v, slopes=alibi_slopes(4), **options)
    blind = ~visible_places(70, 20, causal, 4, first).any(dim=1)
    assert blind.any()
    gradient = gradients(out, (q, k, v))
    assert not out[:, blind].any()
    assert not gradient[0][:, blind].any()
    assert all(torch.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"causal": False}])
def test_no_keys_at_all_give_zero(options: dict[str, Any], path: None) -> None:
    q, k, v = tensors(Shape(5, 0))
    out = attention(q, k, v, **options)
    assert out.shape == q.shape
    assert not out.any()
    assert not gradients(out, (q, k, v))[0].any()


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"causal": False}, {"slopes": alibi_slopes(4)}])
def test_probabilities_are_float32_whatever_the_type(options: dict[str, Any], path: None) -> None:
    assert_equals_dense(Shape(140, 140, groups=2), torch.float32, 3e-6, **options)
    assert_equals_dense(Shape(140, 140, groups=2), torch.bfloat16, 2e-2, **options)


# -- documents and soft caps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9}, {"slopes": alibi_slopes(4)}])
def test_a_query_sees_its_own_document_alone(options: dict[str, Any]) -> None:
    same = PACKED[:, :, None] == PACKED[:, None, :]
    assert_equals_dense(Shape(130, 130, groups=2), documents=PACKED, same=same, **options)
    late = {"first_query": 100, "same": same[:, 100:]}
    assert_equals_dense(Shape(30, 130, groups=2), documents=PACKED, **late, **options)


def test_a_document_is_computed_as_if_it_were_alone() -> None:
    q, k, v = tensors(Shape(130, 130, groups=2, batch=1))
    whole = attention(q, k, v, documents=documents_of(70, 1, 59))
    for first, last in ((0, 70), (70, 71), (71, 130)):
        close(attention(q[:, first:last], k[:, first:last], v[:, first:last]), whole[:, first:last], 1e-12)


def test_a_number_that_comes_again_is_another_document() -> None:
    q, k, v = tensors(Shape(9, 9))
    numbers = torch.tensor([[5, 5, 5, 2, 2, 2, 5, 5, 5], [0, 0, 0, -1, -1, -1, 7, 7, 7]])
    expected = attention(q, k, v, documents=documents_of(3, 3, 3).expand(2, 9))
    torch.testing.assert_close(attention(q, k, v, documents=numbers), expected, rtol=0, atol=0)


def test_a_query_sees_the_keys_of_its_document_elsewhere_and_zero_if_there_are_none() -> None:
    queries, keys = documents_of(3, 4, 5).expand(2, 12), documents_of(6, 0, 14).expand(2, 20)
    same = queries[:, :, None] == keys[:, None, :]
    options = {"causal": False, "documents": keys, "query_documents": queries}
    assert_equals_dense(Shape(12, 20), same=same, **options)
    assert not attention(*tensors(Shape(12, 20)), **options)[:, 3:7].any()


def test_documents_of_cumulated_lengths() -> None:
    assert document_ids(torch.tensor([0, 3, 3, 5]), 7).tolist() == [[0, 0, 0, 2, 2, 3, 3]]


@pytest.mark.parametrize("options", [{}, {"causal": False, "window": 5}, {"slopes": alibi_slopes(4)}])
def test_softcap_bounds_the_scores(options: dict[str, Any]) -> None:
    assert_equals_dense(Shape(70, 70, groups=2), softcap=0.7, **options)


# -- dropout -------------------------------------------------------------------------------------------------------

KEYS = sample_keys(5, torch.tensor([3, 11]))
SLOPES = alibi_slopes(4)


def kept(heads: int, queries: int, keys: int, rate: float, first_query: int = 0) -> Tensor:
    """(B, N, S, T): what the hash says, in the coordinates of the whole sequence."""
    rows, columns = torch.arange(first_query, first_query + queries), torch.arange(keys)
    return keep_mask(split_keys(KEYS, 0, heads), SITE, rows, columns, rate).view(len(KEYS), heads, queries, keys)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9}, {"slopes": alibi_slopes(4)}])
@pytest.mark.parametrize("length", [5, 130, 301])
def test_dropout_leaves_the_probabilities_that_the_hash_says(length: int, options: dict[str, Any]) -> None:
    q, k, v = inputs = tensors(Shape(length, length, groups=2))
    out = attention(q, k, v, dropout=0.3, keys=KEYS, site=SITE, **options)
    expected = dense(q, k, v, keep=kept(4, length, length, 0.3), dropout=0.3, **options)
    close(out, expected, 1e-11)
    for found, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        close(found, wanted, 1e-11)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9}])
def test_dropout_after_a_cache_is_that_of_the_place(options: dict[str, Any]) -> None:
    q, k, v = tensors(Shape(30, 90))
    out = attention(q, k, v, dropout=0.5, keys=KEYS, site=SITE, first_query=60, **options)
    close(out, dense(q, k, v, keep=kept(4, 30, 90, 0.5, 60), dropout=0.5, first_query=60, **options), 1e-11)


@pytest.mark.parametrize("options", [{}, {"window": 70}])
def test_dropout_is_the_same_for_every_block_size(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(Shape(150, 150, groups=1))
    outputs = []
    for block, blocks in ((64, 4), (1, 150), (16, 1000), (7, 1000), (1000, 1)):
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(module, "NUM_BLOCKS", blocks)
        outputs.append(attention(q, k, v, dropout=0.4, keys=KEYS, site=SITE, **options))
    for other in outputs[1:]:
        close(other, outputs[0], 1e-12)


@pytest.mark.parametrize("first", [0, 2, 4])
def test_a_share_of_the_heads_is_the_slice_of_the_whole(first: int) -> None:
    q, k, v = tensors(Shape(70, 70, heads=6, groups=3))
    options: dict[str, Any] = {"dropout": 0.4, "keys": KEYS, "site": SITE}
    whole = attention(q, k, v, **options)
    groups = slice(first // 2, first // 2 + 1)
    share = attention(q[:, :, first : first + 2], k[:, :, groups], v[:, :, groups], first_head=first, **options)
    close(share, whole[:, :, first : first + 2], 1e-12)


def test_dropout_differs_between_samples_heads_and_sites() -> None:
    ones = torch.ones(2, 40, 2, 1, dtype=torch.float64)
    values = torch.randn(1, 40, 1, 1, dtype=torch.float64).expand(2, 40, 2, 1)

    def at(site: int) -> Tensor:
        return attention(ones, ones, values, dropout=0.5, keys=KEYS, site=site)

    out, other = at(1), at(2)
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(out[:, :, 0], out[:, :, 1])
    assert not torch.equal(out, other)
    assert torch.equal(out, at(1))


# -- the rest ------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_compiled_attention_is_the_eager_one() -> None:
    """Fused, the hash's arithmetic is C++ in loop counters: see kernels/noise.py."""

    def everything(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout=0.3, keys=KEYS, site=SITE, window=30, slopes=SLOPES)

    eager = tensors(Shape(40, 40, groups=2, size=16), torch.float32)
    compiled = tuple(tensor.detach().clone().requires_grad_() for tensor in eager)
    torch.compiler.reset()
    expected, found = everything(*eager), torch.compile(everything, dynamic=False, fullgraph=True)(*compiled)
    close(found, expected, 3e-6)
    for ours, theirs in zip(gradients(found, compiled), gradients(expected, eager), strict=True):
        close(ours, theirs, 3e-6)


PUBLISHED = {  # ofirpress/attention_with_linear_biases, get_slopes
    8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
    12: [
        *[1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
        *[2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
    ],
}


@pytest.mark.parametrize("num_heads", [8, 12])
def test_alibi_slopes_are_the_published_ones(num_heads: int) -> None:
    torch.testing.assert_close(alibi_slopes(num_heads), torch.tensor(PUBLISHED[num_heads]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_heads", range(1, 34))
def test_alibi_has_one_slope_a_head_and_no_two_alike(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,)
    assert len(set(slopes.tolist())) == num_heads
    assert ((slopes > 0) & (slopes < 1)).all()


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        (Shape(4, 4, heads=4, groups=3), {}, "N a multiple of G"),
        (Shape(4, 4), {"window": 0}, "at least 1"),
        (Shape(4, 4), {"dropout": 0.1}, "sample_keys"),
        (Shape(4, 4), {"first_query": 1, "documents": torch.zeros(2, 4)}, "query_documents"),
    ],
)
def test_mistakes_are_told(shape: Shape, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention(*tensors(shape), **options)


@pytest.mark.parametrize("part", ["length", "size"])
def test_keys_and_values_of_other_shapes_are_told(part: str) -> None:
    q, k, v = tensors(Shape(4, 4))
    wrong = (q, k, v[:, :3]) if part == "length" else (q, k[..., :4], v[..., :4])
    with pytest.raises(ValueError, match=r"found \(2, 4, 4, 8\)"):
        attention(*wrong)
