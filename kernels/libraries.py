"""Attention by kernels that others wrote, cuDNN's and FlashAttention's, as torch offers them.

None has dropout here: a library draws its mask by itself, and then layouts and tiles would change it. None takes a mask
as a tensor, with which cuDNN's backward gives NaN (pytorch #196678). The arguments are `kernels.attention.attention`'s.

Shapes: B batch, S queries, T keys, N heads, G key/value heads, D head size.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from kernels.documents import numbered

FLASH_3 = "flash_attn_interface"  # the module of FlashAttention-3's wheel


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> Tensor:
    """q (B, S, N, D), k and v (B, T, G, D) -> (B, S, N, D); causal only where S = T."""
    return _dense(SDPBackend.CUDNN_ATTENTION, q, k, v, causal, scale)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> Tensor:
    """Of FlashAttention-3 where `use_flash_3` was called, else torch's own FlashAttention-2; on a CPU torch's tiles."""
    return _dense(SDPBackend.FLASH_ATTENTION, q, k, v, causal, scale)


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """With documents (B, S) each is a sequence of its own: where they end is read back, once a call."""
    from torch.nn.attention.varlen import varlen_attn

    batch, length, heads, size = q.shape
    total = k.shape[1]
    ends = key_ends = _row_ends(batch, length, q.device)
    if documents is not None:
        ends = key_ends = document_ends(documents)
    elif total != length:
        key_ends = _row_ends(batch, total, q.device)
    before = -1 if window is None else window - 1
    out = varlen_attn(
        q.reshape(batch * length, heads, size),
        k.reshape(batch * total, -1, size),
        v.reshape(batch * total, -1, size),
        ends,
        key_ends,
        length,
        total,
        scale=scale,
        window_size=(before, 0 if causal else before),
        enable_gqa=heads != k.shape[2],
    )
    assert isinstance(out, Tensor)
    return out.view(batch, length, heads, size)


def document_ends(documents: Tensor) -> Tensor:
    """(documents of all rows + 1,) int32, from 0: where each ends in the rows (B, S) laid one after the other."""
    runs, _ = numbered(documents, None, 0, documents.shape[1])
    begins = F.pad(runs[:, 1:] != runs[:, :-1], (1, 0), value=True).flatten()
    return F.pad(begins.nonzero()[:, 0], (0, 1), value=begins.numel()).to(torch.int32)


@functools.cache
def _row_ends(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)


def has_flash_3() -> bool:
    return importlib.util.find_spec(FLASH_3) is not None


def use_flash_3() -> None:
    """From here on torch's FlashAttention is version 3, in this process."""
    activate_flash_attention_impl("FA3")
