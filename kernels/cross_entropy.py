"""The output matrix and its cross-entropy in one: sum over the targets of logsumexp(z) - z[target], z = x W^T + b.

Logits over a vocabulary are the largest activation of a language model, so they are made for a chunk of rows at a time and
never kept. A chunk's gradient needs only its own logits: the forward pass computes it at once, scaled by 1, and the backward
pass multiplies by what the loss is multiplied by. Three products a chunk, nothing recomputed, one chunk of memory.

The vocabulary may be cut over a group of ranks (Shoeybi et al. 2019, section 3): a maximum, a sum of exponentials and a
target's logit then go around the group for each chunk, never the logits. Softmax and sums are float32 (float64 for float64).

Label smoothing (Szegedy et al. 2016, section 7) takes the share s from the target and spreads it over all classes: it adds
s (logit of the target - mean logit), the mean over the real classes of every rank. z-loss adds z logsumexp^2 for each target
(Chowdhery et al. 2022, "PaLM", section 5).

Backends: `torch`, which is the CPU's path and the reference; `triton`, which reads a chunk's logits once for a row's
statistics and once to write the slope over them (`kernels.cross_entropy_triton`). They differ by the rounding of their sums.

Shapes: B batch, S sequence, M = B S rows, H hidden, V this rank's classes (padding included).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from kernels import cross_entropy_triton
from kernels.available import Wish, choose, unsupported

CHUNK_BYTES = 64 << 20  # of float32 logits
TRITON_CHUNK_BYTES = 256 << 20  # of logits in their own type, all that this backend needs of them
MAX_CHUNKS = 16  # torch.compile unrolls them


class Rules(NamedTuple):
    """What a loss is, besides its tensors."""

    vocab_size: int
    first_class: int
    group: Any
    smoothing: float
    z_loss: float
    triton: bool
    learns: bool  # the weight has a gradient


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    vocab_size: int,
    bias: Tensor | None = None,
    first_class: int = 0,
    group: Any = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: Wish = "auto",
) -> Tensor:
    """Sum of the cross-entropy over the targets where mask is 1, a float32 scalar, the same on every rank of `group`.

    x (B, S, H); weight (V, H), whose row i is class first_class + i and rows from vocab_size on are padding that no
    probability reaches; targets (B, S) ids below vocab_size; mask (B, S) 0 or 1; bias (V,), added to the logits.
    smoothing: label smoothing, in [0, 1); z_loss: the factor of logsumexp^2. backend: `auto` is Triton on a GPU (where it
    cannot run, torch with a warning that says why) and torch on a CPU. The gradient of x is this rank's part of the sum
    over the group.

    Raises ValueError for `triton` where it cannot run, and for a smoothing, z_loss or backend that there is not.
    """
    _check(smoothing, z_loss, backend)
    rules = Rules(vocab_size, first_class, group, smoothing, z_loss, _runs_triton(backend, x), weight.requires_grad)
    rows = x.reshape(-1, x.shape[-1])
    targets, mask = targets.reshape(-1), mask.reshape(-1)
    learning = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if not (torch.is_grad_enabled() and learning):
        return _forward_only(rows, weight, bias, targets, mask, rules)
    return _Loss.apply(rows, weight, bias, targets, mask, rules)  # type: ignore[no-any-return]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Per-token cross-entropy (B, S), float32, of logits (B, S, V) and ids (B, S); for evaluation."""
    logits = _wide(logits)
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, targets[..., None])[..., 0]


def chunk_rows(num_rows: int, num_classes: int) -> int:
    """Rows of logits made at a time: a function of the shape alone."""
    rows = max(1024, CHUNK_BYTES // (4 * num_classes))
    return max(rows, -(-num_rows // MAX_CHUNKS))


def triton_chunk_rows(num_rows: int, num_classes: int, itemsize: int) -> int:
    """Rows of logits made at a time for Triton's passes, chunks of equal size: more, since they need less memory a row, so
    that the products are larger and the gradient of the weight is added up fewer times."""
    rows = max(1024, TRITON_CHUNK_BYTES // (itemsize * num_classes))
    return max(1, -(-num_rows // min(max(1, -(-num_rows // rows)), MAX_CHUNKS)))


def _check(smoothing: float, z_loss: float, backend: str) -> None:
    if not 0 <= smoothing < 1:
        raise ValueError(f"label smoothing is in [0, 1), found {smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss is 0 or more, found {z_loss}")
    if backend not in get_args(Wish):
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(get_args(Wish))}")


def _runs_triton(wish: Wish, x: Tensor) -> bool:
    try:
        backend, reason = choose(wish, x.device, lambda: unsupported(x))
    except ValueError as error:
        raise ValueError(f"the loss: {error}") from None
    if reason:
        warnings.warn(f"the loss runs in torch on {x.device}, not in its Triton kernels: {reason}", stacklevel=3)
    return backend == "triton"


# -- chunk by chunk --------------------------------------------------------------------------------------------------


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor, rules: Rules
    ) -> Tensor:
        total = _zero(x)
        grad_x, grad_weight, grad_bias = [], None, None
        step = _step(x, weight, rules)
        for here, some, counts in _chunks(step, x, targets, mask):
            loss, slope = _chunk(here, weight, bias, some, counts, rules, sloped=True)
            assert slope is not None
            total = total + loss
            grad_x.append(slope @ weight)
            part = slope.t() @ here if rules.learns else None
            if bias is not None:
                summed = slope.sum(dim=0, dtype=_wide(slope[:0]).dtype)
                grad_bias = summed if grad_bias is None else grad_bias + summed
            del slope  # or it would lie beside the next chunk's logits
            # chunks are summed in float32: bf16 sums would lose what a late chunk adds
            if part is not None:
                grad_weight = part if step >= x.shape[0] else _wide(part) if grad_weight is None else grad_weight + part
        if bias is not None and grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        whole = torch.cat(grad_x) if len(grad_x) > 1 else grad_x[0]
        ctx.save_for_backward(whole, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        of_weight, of_bias = (None if part is None else _times(part, grads[0]) for part in (grad_weight, grad_bias))
        return _times(grad_x, grads[0]), of_weight, of_bias, None, None, None


def _forward_only(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor, rules: Rules
) -> Tensor:
    total = _zero(x)
    for here, some, counts in _chunks(_step(x, weight, rules), x, targets, mask):
        total = total + _chunk(here, weight, bias, some, counts, rules, sloped=False)[0]
    return total


def _step(x: Tensor, weight: Tensor, rules: Rules) -> int:
    if rules.triton:
        return triton_chunk_rows(x.shape[0], weight.shape[0], x.element_size())
    return chunk_rows(x.shape[0], weight.shape[0])


def _chunks(step: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for start in range(0, tensors[0].shape[0], step):
        yield tuple(tensor[start : start + step] for tensor in tensors)


def _chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor, rules: Rules, sloped: bool
) -> tuple[Tensor, Tensor | None]:
    """Of a chunk (M, H): the sum of its losses and, if asked for, its slope by the logits (M, V) in x's type."""
    return (_triton_chunk if rules.triton else _torch_chunk)(x, weight, bias, targets, mask, rules, sloped)


def _real(weight: Tensor, rules: Rules) -> int:
    """Those of this rank's classes that are no padding."""
    return min(max(rules.vocab_size - rules.first_class, 0), weight.shape[0])


def _row_losses(log_sum: Tensor, at_target: Tensor, mean: Tensor, rules: Rules, over_target: Tensor) -> Tensor:
    """(M,) from the logarithm of the sum of exponentials, how far it lies over the target's logit, and the mean logit."""
    losses = over_target
    if rules.smoothing:
        losses = losses + rules.smoothing * (at_target - mean)
    if rules.z_loss:
        losses = losses + rules.z_loss * log_sum.square()
    return losses


# -- in Triton -------------------------------------------------------------------------------------------------------


def _triton_chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor, rules: Rules, sloped: bool
) -> tuple[Tensor, Tensor | None]:
    """The logits' memory becomes the slope's."""
    real = _real(weight, rules)
    logits, counts = F.linear(x, weight, bias), mask.float()
    found = cross_entropy_triton.statistics(logits, targets, rules.first_class, real, rules.smoothing > 0)
    if rules.group is not None:
        highest = _reduced(found[0].clone(), rules.group, torch.distributed.ReduceOp.MAX)
        sums = torch.stack((found[1] * torch.exp(found[0] - highest), found[2], found[3]))
        found = torch.cat((highest[None], _reduced(sums, rules.group, torch.distributed.ReduceOp.SUM)))
    highest, total, at_target, summed = found.unbind()
    rest = torch.log(total)
    over_target = (highest - at_target) + rest  # in this order exact for large logits
    losses = _row_losses(highest + rest, at_target, summed / rules.vocab_size, rules, over_target)
    loss = (losses * counts).sum()
    if not sloped:
        return loss, None
    cross_entropy_triton.write_slope(
        logits, found, targets, counts, rules.first_class, real, rules.vocab_size, rules.smoothing, rules.z_loss
    )
    return loss, logits


# -- in torch --------------------------------------------------------------------------------------------------------


def _torch_chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, mask: Tensor, rules: Rules, sloped: bool
) -> tuple[Tensor, Tensor | None]:
    logits, log_sum, at_target, mean, local = _softmax_parts(x, weight, bias, targets, rules)
    counts = mask.to(logits.dtype)
    loss = (_row_losses(log_sum, at_target, mean, rules, log_sum - at_target) * counts).sum()
    if not sloped:
        return loss, None
    columns = torch.arange(weight.shape[0], device=x.device)
    is_target = columns == local[:, None]
    slope = torch.exp(logits - log_sum[:, None])
    if rules.z_loss:
        slope = slope * (1.0 + 2.0 * rules.z_loss * log_sum[:, None])
    if rules.smoothing:
        slope = slope - (columns < _real(weight, rules)).to(slope.dtype) * (rules.smoothing / rules.vocab_size)
    slope = torch.sub(slope, is_target.to(slope.dtype), alpha=1.0 - rules.smoothing)
    return loss, (slope * counts[:, None]).to(x.dtype)


def _softmax_parts(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a chunk: logits (M, V) with the padding at -inf; log of the sum of exponentials (M,), the target's logit (M,) and
    the mean logit (M,; the target's where there is no smoothing), all over the whole vocabulary; the target's place (M,)
    among this rank's classes, -1 where another rank has it."""
    logits = _wide(F.linear(x, weight, bias))
    real = _real(weight, rules)
    means = [logits[:, :real].sum(dim=1) / rules.vocab_size] if rules.smoothing else []
    if real < weight.shape[0]:
        columns = torch.arange(weight.shape[0], device=x.device)
        logits = torch.where(columns < real, logits, -torch.inf)
    local = targets - rules.first_class
    local = torch.where((local >= 0) & (local < real), local, -1)
    at_target = logits.gather(1, local.clamp(min=0)[:, None])[:, 0]
    if rules.group is None:
        return logits, torch.logsumexp(logits, dim=1), at_target, means[0] if means else at_target, local
    at_target = torch.where(local >= 0, at_target, 0.0)
    highest = _reduced(logits.amax(dim=1), rules.group, torch.distributed.ReduceOp.MAX)
    sums = torch.stack((torch.exp(logits - highest[:, None]).sum(dim=1), at_target, *means))
    sums = _reduced(sums, rules.group, torch.distributed.ReduceOp.SUM)
    return logits, highest + torch.log(sums[0]), sums[1], sums[-1], local


def _reduced(x: Tensor, group: Any, operation: Any) -> Tensor:
    torch.distributed.all_reduce(x, op=operation, group=group)
    return x


def _times(gradient: Tensor, scale: Tensor) -> Tensor:
    return (_wide(gradient) * scale).to(gradient.dtype)


def _zero(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
