"""Documents packed into one sequence: who sees whom.

A document is an unbroken run of places with the same number, so a query sees an interval of keys, and a key is seen by an
interval of queries. Nothing here reads a value on the host: a sequence costs two binary searches and no synchronisation.

Shapes: B batch, S queries, T keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Intervals [low, high) of keys for each query, (B, S) int32, and of queries for each key, (B, T) int32."""

    key_low: Tensor
    key_high: Tensor
    query_low: Tensor
    query_high: Tensor


def document_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """(1, length) int32 numbers of documents that end at cu_seqlens[1:] (int, from 0, as in FlashAttention's varlen).

    Places beyond the last end are one more document.
    """
    places = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True).to(torch.int32)[None]


def numbered(
    documents: Tensor, query_documents: Tensor | None, first_query: int, num_queries: int
) -> tuple[Tensor, Tensor]:
    """Numbers (B, S) of the queries' and (B, T) of the keys' documents: equal where one sees the other.

    documents (B, T). Without query_documents the queries stand among the keys from first_query on, and the runs are
    counted, whatever their numbers. With query_documents (B, S), keys elsewhere (cross-attention), both are taken as they
    are and must not decrease along a sequence.
    """
    if query_documents is not None:
        return query_documents, documents
    if first_query + num_queries > documents.shape[1]:
        raise ValueError(
            f"documents number {documents.shape[1]} places, but the queries stand at "
            f"{first_query} to {first_query + num_queries - 1}: pass query_documents"
        )
    changes = (documents[:, 1:] != documents[:, :-1]).to(torch.int32)
    runs = torch.nn.functional.pad(changes, (1, 0)).cumsum(dim=1, dtype=torch.int32)
    return runs[:, first_query : first_query + num_queries], runs


def bounds(queries: Tensor, keys: Tensor) -> Bounds:
    """queries (B, S) and keys (B, T), from `numbered`."""
    queries, keys = queries.contiguous(), keys.contiguous()
    return Bounds(
        torch.searchsorted(keys, queries, out_int32=True),
        torch.searchsorted(keys, queries, out_int32=True, right=True),
        torch.searchsorted(queries, keys, out_int32=True),
        torch.searchsorted(queries, keys, out_int32=True, right=True),
    )
