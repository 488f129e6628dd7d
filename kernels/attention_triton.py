"""Attention on Triton kernels: the function of `kernels.attention.attention`, in tiles, forward and backward.

The kernels (`kernels/triton`) are behind the operator `kernels::flash_attention`, which torch.compile sees as one
differentiable step. Triton is imported when a kernel is first launched, never with this module. On a GPU the tiles come
from `kernels/tiles.py`; on a CPU the kernels run in Triton's interpreter alone (TRITON_INTERPRET=1 before the first import
of triton), which is slow and is there to prove them.

Shapes: B batch, S queries, T keys, N heads, G key/value heads, D head size.
Always: a probability's dropout is `kernels.noise.keep_mask`'s at its place, so no tile or layout changes it; every sum has
one order, so twice the same inputs give twice the same bits; a query that sees no key gives 0 and has gradient 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import tiles
from kernels.available import no_triton
from kernels.documents import Bounds, bounds, numbered
from kernels.relative import wrong_bias

LARGEST_SIZE = 256
LARGEST_GRID = 65535  # of a grid's second and third dimension
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Options(NamedTuple):
    """What a launch needs besides the tensors, as the kernels take it."""

    causal: bool
    window: int  # 0: none
    dropout: float
    site: int
    first_head: int
    first_query: int
    scale: float
    softcap: float  # 0: none


def flash_attention(
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
    """`kernels.attention.attention`, whose arguments these are. Raises ValueError with `unsupported`'s reason."""
    reason = unsupported(q, k, v, slopes=slopes, bias=bias, edges=edges, dropout=dropout, keys=keys)
    if reason:
        raise ValueError(f"the Triton attention kernels cannot run this: {reason}")
    if window is not None and window < 1:
        raise ValueError(f"an attention window is at least 1 (the query's own place), found {window}")
    length, total = q.shape[1], k.shape[1]
    if window is not None and window >= max(total, first_query + length):
        window = None
    seen: tuple[Tensor | None, ...] = (None, None, None, None)
    if documents is not None:
        seen = bounds(*numbered(documents, query_documents, first_query, length))
    out, _ = torch.ops.kernels.flash_attention(
        q,
        k,
        v,
        None if slopes is None else slopes.contiguous(),
        bias,
        edges,
        keys.contiguous() if keys is not None and dropout else None,
        *seen,
        causal,
        window or 0,
        dropout,
        site,
        first_head,
        first_query,
        1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
        softcap or 0.0,
    )
    return out


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    edges: Tensor | None = None,
    dropout: float = 0.0,
    keys: Tensor | None = None,
) -> str:
    """Why the kernels cannot run on these tensors: one phrase, "" if they can."""
    batch, _, heads, size = q.shape
    if heads % k.shape[2] or k.shape != v.shape or size != k.shape[3] or batch != k.shape[0]:
        found = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        return f"q (B, S, N, D) and k, v (B, T, G, D) with N a multiple of G are needed, found {found}"
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v must all be float32, float16 or bfloat16, found {q.dtype}, {k.dtype}, {v.dtype}"
    if size > LARGEST_SIZE:
        return f"heads of at most {LARGEST_SIZE} are supported, found {size}"
    if batch > LARGEST_GRID or heads > LARGEST_GRID:
        return f"at most {LARGEST_GRID} sequences and heads are supported, found {batch} and {heads}"
    if slopes is not None and slopes.requires_grad:
        return "linear biases have no gradient here"
    if wrong := wrong_bias(bias, edges, slopes, heads):
        return wrong
    if dropout and (keys is None or keys.dtype != torch.int32):
        return "dropout needs int32 `keys`, one for each sequence: see kernels.noise.sample_keys"
    return _device_reason(q)


def _device_reason(q: Tensor) -> str:
    if reason := no_triton(q.device):
        return reason
    if q.device.type == "cpu":
        return "Triton's interpreter multiplies bfloat16 wrongly" if q.dtype == torch.bfloat16 else ""
    device = capability(q)
    known = ", ".join(f"{known / 10}" for known in tiles.DEVICES)
    return "" if device in tiles.DEVICES else f"tiles are known for compute capability {known}, not {device / 10}"


def capability(q: Tensor) -> int:
    """10 times the compute capability; 0 for the interpreter."""
    if q.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(q.device)
    return 10 * major + minor


# -- the operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("kernels::flash_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    bias: Tensor | None,
    edges: Tensor | None,
    keys: Tensor | None,
    key_low: Tensor | None,
    key_high: Tensor | None,
    query_low: Tensor | None,
    query_high: Tensor | None,
    causal: bool,
    window: int,
    dropout: float,
    site: int,
    first_head: int,
    first_query: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """-> out (B, S, N, D) and lse (B, N, S) float32, the base-2 logarithm of a row's sum of exp; -inf for an empty row.

    The four bounds are those of `kernels.documents.Bounds`, all or none; query_low and query_high are for the backward.
    """
    from kernels import attention_launch as launch  # here, so that importing this module needs no triton

    options = Options(causal, window, dropout, site, first_head, first_query, scale, softcap)
    with torch.cuda.device_of(q):  # Triton launches on the current device; on a CPU this does nothing
        return launch.forward(q, k, v, slopes, bias, edges, keys, key_low, key_high, options)


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _size = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("kernels::flash_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slopes: Tensor | None,
    bias: Tensor | None,
    edges: Tensor | None,
    keys: Tensor | None,
    key_low: Tensor | None,
    key_high: Tensor | None,
    query_low: Tensor | None,
    query_high: Tensor | None,
    causal: bool,
    window: int,
    dropout: float,
    site: int,
    first_head: int,
    first_query: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the gradients of q, k, v and bias, contiguous; of no bias (0, 0)."""
    from kernels import attention_launch as launch

    options = Options(causal, window, dropout, site, first_head, first_query, scale, softcap)
    seen = None
    if key_low is not None:
        assert key_high is not None and query_low is not None and query_high is not None
        seen = Bounds(key_low, key_high, query_low, query_high)
    with torch.cuda.device_of(q):
        return launch.backward(grad, q, k, v, out, lse, slopes, bias, edges, keys, seen, options)


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slopes: Tensor | None,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = q.new_empty(0, 0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), table


NUM_OPTIONAL = 8  # tensors that the operator takes after q, k and v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *others = inputs
    ctx.biased = others[1] is not None
    ctx.options = others[NUM_OPTIONAL:]
    ctx.save_for_backward(q, k, v, *output, *others[:NUM_OPTIONAL])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dq, dk, dv, table = torch.ops.kernels.flash_attention_backward(grad, *saved, *ctx.options)
    unbiased = [None] * (NUM_OPTIONAL - 2 + len(ctx.options))
    return dq, dk, dv, None, table if ctx.biased else None, *unbiased


_forward.register_autograd(_differentiate, setup_context=_save)
