"""Softmax attention with causal, window and document masks, biases and dropout: softmax(q k^T * scale + bias) v.

The plain-torch path works in blocks of queries: a block multiplies only the keys that one of its queries may see, so a
causal mask saves nearly half of the products and a window nearly all. Inside torch.compile the masking, softmax and dropout
of a block are one fused loop. The probabilities are float32, the products in the tensors' own type.

Shapes: B batch, S queries, T keys, N heads, G key/value heads (N = G R: head n reads key head n // R), D head size.
Always: what a query sees, and its dropout mask, depend on its place in the whole sequence and on its head's number in the
whole model, never on the block or on how heads are shared out. A query that sees no key gives 0 and has gradient 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.documents import numbered
from kernels.noise import keep_mask, split_keys
from kernels.relative import by_distance, by_place, wrong_bias

MASKED = -1e30  # finite, so that a row without any visible key has no NaN; exp(MASKED - maximum) is exactly 0
COMPILED_LENGTH = 1024  # up to here the compiled blocks beat the library; measured in docs/log.md
NUM_BLOCKS = 4  # of queries, at most: the causal products are then 62% of the square
BLOCK = 64  # queries, at least: below this a product is too small to pay


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    edges: Tensor | None = None,
    documents: Tensor | None = None,
    query_documents: Tensor | None = None,
    dropout: float = 0.0,
    keys: Tensor | None = None,
    site: int = 0,
    first_head: int = 0,
    first_query: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q (B, S, N, D), k and v (B, T, G, D) -> (B, S, N, D).

    causal: query i, at place first_query + i of the keys, sees keys up to its own place. window: it sees places less than
    `window` away, itself included. slopes (N,): adds -slope * distance to the scores (Press et al. 2022, "ALiBi").
    bias (N, I) with edges (I - 1,) int32, ascending: adds bias[n, i] to the scores of head n where edges[i - 1] <= key's
    place - query's place < edges[i] (`kernels.relative`; Raffel et al. 2020, "T5"); not together with slopes.
    documents (B, T) int: a query sees its own document only, the unbroken run of its number (`kernels.documents`); keys
    elsewhere (cross-attention) need the queries' own numbers too, query_documents (B, S), neither decreasing.
    dropout, of the probabilities: the mask is a hash of keys (B,) (`kernels.noise.sample_keys`), site, first_head + head,
    query and key. first_query: where q begins among the keys, for a key/value cache. scale: 1 / sqrt(D) unless given.
    softcap: scores become softcap * tanh(scores / softcap), before biases (Gemma Team 2024, "Gemma 2").
    """
    _check(q, k, v, window, dropout, keys)
    if wrong := wrong_bias(bias, edges, slopes, q.shape[2]):
        raise ValueError(wrong)
    length, total = q.shape[1], k.shape[1]
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    if window is not None and window >= max(total, first_query + length):
        window = None
    numbers = None if documents is None else numbered(documents, query_documents, first_query, length)
    if causal and window is None and length and first_query + 1 >= total:
        causal = False  # nothing is masked: the last query, or one query with a cache
    aligned = not causal or (first_query == 0 and length == total)
    biased = slopes is not None or bias is not None
    plain = window is None and not biased and numbers is None and softcap is None and dropout == 0.0
    if plain and aligned and _library_is_faster(q):
        return _library(q, k, v, causal, scale)
    relative = None
    if bias is not None and edges is not None:
        wide = bias.to(torch.promote_types(q.dtype, torch.float32))
        relative = by_distance(wide, edges, 1 - first_query - length, max(length + total - 1, 0))
    return _blocks(
        q, k, v, causal, window, slopes, relative, numbers, dropout, keys, site, first_head, first_query, scale, softcap
    )


def alibi_slopes(num_heads: int) -> Tensor:
    """(N,) float32 slopes 2^(-8 i / N), i = 1..N; for N no power of two, those of the power below and every other one of
    the power above (Press et al. 2022, the authors' code)."""

    def powers(count: int) -> list[float]:
        return [2.0 ** (-8.0 * i / count) for i in range(1, count + 1)]

    below = 1 << (num_heads.bit_length() - 1)
    return torch.tensor(powers(below) + powers(2 * below)[0::2][: num_heads - below])


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout: float, keys: Tensor | None) -> None:
    if q.shape[2] % k.shape[2] or k.shape != v.shape or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention needs q (B, S, N, D) and k, v (B, T, G, D) with N a multiple of G; "
            f"found {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"an attention window is at least 1 (the query's own place), found {window}")
    if dropout and keys is None:
        raise ValueError("dropout needs `keys`, one for each sequence: see kernels.noise.sample_keys")


def _library_is_faster(q: Tensor) -> bool:
    """Decided by shape and by whether the code is being compiled, never by a timing, so that a resumed run is bitwise."""
    return not torch.compiler.is_compiling() or q.shape[1] > COMPILED_LENGTH


def _library(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    slopes: Tensor | None,
    relative: Tensor | None,
    numbers: tuple[Tensor, Tensor] | None,
    dropout: float,
    keys: Tensor | None,
    site: int,
    first_head: int,
    first_query: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    batch, length, heads, size = q.shape
    total, groups = k.shape[1], k.shape[2]
    ratio = heads // groups
    queries = q.view(batch, length, groups, ratio, size).permute(0, 2, 3, 1, 4)  # (B, G, R, S, D)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, T, D)
    head_keys = None
    if dropout:
        assert keys is not None
        head_keys = split_keys(keys, first_head, heads)  # (B N,)
    rows = max(BLOCK, -(-length // NUM_BLOCKS)) if causal or window is not None else max(length, 1)
    out = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        low, high = _visible(first_query + start, first_query + stop, total, causal, window)
        here = queries[:, :, :, start:stop].reshape(batch * groups, ratio * (stop - start), size)
        if high <= low:
            out.append((here * 0.0).view(batch, groups, ratio, stop - start, size))
            continue
        product = torch.bmm(here, k[:, :, low:high].reshape(batch * groups, high - low, size).transpose(1, 2))
        scores = _wide(product).view(batch, groups, ratio, stop - start, high - low) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if relative is not None:
            added = by_place(relative[:, length - stop + low : length - start + high - 1], stop - start)
            scores = scores + added.view(groups, ratio, stop - start, high - low)
        places = torch.arange(first_query + start, first_query + stop, device=q.device)
        columns = torch.arange(low, high, device=q.device)
        same = None
        if numbers is not None:
            same = (numbers[0][:, start:stop, None] == numbers[1][:, None, low:high])[:, None, None]
        weights = _probabilities(scores, places, columns, causal, window, slopes, same)
        if head_keys is not None:
            keep = keep_mask(head_keys, site, places, columns, dropout).view(weights.shape)
            weights = torch.where(keep, weights * (1.0 / (1.0 - dropout)), 0.0)
        weights = weights.to(v.dtype).view(batch * groups, ratio * (stop - start), high - low)
        values = v[:, :, low:high].reshape(batch * groups, high - low, size)
        out.append(torch.bmm(weights, values).view(batch, groups, ratio, stop - start, size))
    whole = out[0] if len(out) == 1 else torch.cat(out, dim=3)
    return whole.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def _visible(first: int, last: int, total: int, causal: bool, window: int | None) -> tuple[int, int]:
    """The keys [low, high) that some query at the places [first, last) may see."""
    high = min(total, last) if causal else total
    low = 0
    if window is not None:
        low = max(0, first - window + 1)
        high = min(high, last + window - 1)
    return low, high


def _probabilities(
    scores: Tensor,
    places: Tensor,
    columns: Tensor,
    causal: bool,
    window: int | None,
    slopes: Tensor | None,
    same: Tensor | None,
) -> Tensor:
    """Softmax over the visible keys of scores (B, G, R, S, T); places (S,) of the queries, columns (T,) of the keys.

    same (B, 1, 1, S, T): whether query and key are of one document.
    """
    distance = places[:, None] - columns[None, :]
    if slopes is not None:
        slopes = slopes.to(scores.dtype).view(scores.shape[1], scores.shape[2], 1, 1)
        scores = scores - slopes * distance.abs()
    if not causal and window is None and same is None:
        return torch.softmax(scores, dim=-1)
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        visible = visible & (distance.abs() < window)
    if same is not None:
        visible = visible & same
    weights = torch.softmax(torch.where(visible, scores, MASKED), dim=-1)
    if window is None and same is None:
        return weights  # every causal row sees at least one key of its block
    return torch.where(visible, weights, 0.0)  # a row beyond the last key, or whose document has no key, sees none


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
