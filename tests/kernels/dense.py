"""The definition of attention, dense and in float64, and what the tests of every implementation compare with it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import attention


class Shape(NamedTuple):
    queries: int
    keys: int
    heads: int = 4
    groups: int = 4
    batch: int = 2
    size: int = 8


def tensors(shape: Shape, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, S, N, D), k and v (B, T, G, D) that want gradients."""
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = [(shape.queries, shape.heads), (shape.keys, shape.groups), (shape.keys, shape.groups)]
    made = [torch.randn(shape.batch, *size, shape.size, generator=generator, dtype=torch.float64) for size in sizes]
    q, k, v = (tensor.to(dtype).requires_grad_() for tensor in made)
    return q, k, v


def visible_places(queries: int, keys: int, causal: bool, window: int | None, first_query: int) -> Tensor:
    """(S, T), pair by pair as the documentation says it."""

    def sees(i: int, j: int) -> bool:
        place = first_query + i
        return (not causal or j <= place) and (window is None or abs(place - j) < window)

    pairs = [[sees(i, j) for j in range(keys)] for i in range(queries)]
    return torch.tensor(pairs, dtype=torch.bool).view(queries, keys)


def bucket_places(queries: int, keys: int, edges: list[int], first_query: int) -> Tensor:
    """(S, T) buckets, pair by pair as the documentation says it."""

    def bucket(distance: int) -> int:
        return sum(edge <= distance for edge in edges)

    pairs = [[bucket(j - first_query - i) for j in range(keys)] for i in range(queries)]
    return torch.tensor(pairs, dtype=torch.int64).view(queries, keys)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    window: int | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    edges: Tensor | None = None,
    scale: float | None = None,
    first_query: int = 0,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    same: Tensor | None = None,
) -> Tensor:
    """The definition, all scores at once. keep (B, N, S, T): which probabilities dropout leaves; same (B, S, T): of which
    pairs the documents are the same."""
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    share = heads // k.shape[2]
    k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
    scores = torch.einsum("bsnd,btnd->bnst", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        places = torch.arange(queries)[:, None] + first_query
        scores = scores - slopes[:, None, None] * (places - torch.arange(keys)[None, :]).abs()
    if bias is not None and edges is not None:
        scores = scores + bias[:, bucket_places(queries, keys, edges.tolist(), first_query)]
    visible = visible_places(queries, keys, causal, window, first_query)
    if same is not None:
        visible = visible & same[:, None]
    highest = scores.detach().masked_fill(~visible, -1e300).amax(-1, keepdim=True)
    powers = torch.exp((scores - highest).masked_fill(~visible, -1e300)) * visible
    weights = powers / powers.sum(-1, keepdim=True).clamp(min=1e-300)
    if keep is not None:
        weights = weights * keep / (1 - dropout)
    return torch.einsum("bnst,btnd->bsnd", weights, v)


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Of a sum with uneven weights; zeros where the result does not depend on an input."""
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape).sin()
    found = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def assert_equals_dense(
    shape: Shape, dtype: torch.dtype = torch.float64, tolerance: float = 1e-11, **options: Any
) -> None:
    ours = tensors(shape, dtype)
    theirs = tuple(tensor.detach().double().requires_grad_() for tensor in ours)
    same = options.pop("same", None)
    added = next((name for name in ("slopes", "bias") if name in options), None)
    ours_added: dict[str, Tensor] = {}
    theirs_added: dict[str, Tensor] = {}
    if added is not None:
        given = options.pop(added)
        ours_added[added] = given.to(dtype).requires_grad_()
        theirs_added[added] = given.to(dtype).double().requires_grad_()
    out = attention(*ours, **ours_added, **options)
    expected = dense(*theirs, same=same, **theirs_added, **options_of_dense(options))
    ours, theirs = (*ours, *ours_added.values()), (*theirs, *theirs_added.values())
    assert out.dtype == dtype
    assert out.shape == ours[0].shape
    close(out, expected, tolerance)
    for name, found, wanted in zip(
        ["q", "k", "v", "added"], gradients(out, ours), gradients(expected, theirs), strict=False
    ):
        close(found, wanted, tolerance, name)


def options_of_dense(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("documents", "query_documents")}


def close(found: Tensor, wanted: Tensor, tolerance: float, name: str = "output") -> None:
    size = wanted.abs().max().clamp(min=1.0) if wanted.numel() else torch.ones(())
    difference = (found.double() - wanted.double()).abs().max() if wanted.numel() else torch.zeros(())
    assert difference <= tolerance * size, f"{name}: {difference} of {size}"


def documents_of(*lengths: int) -> Tensor:
    """(1, T) numbers of documents of these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


PACKED = torch.cat((documents_of(1, 1, 68, 60), documents_of(130, 0, 0, 0)))
