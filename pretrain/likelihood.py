"""Log-probabilities of given continuations by a causal model, many at once.

Continuations are computed in batches of like lengths, filled up on the right, where a causal model does not look; results
come in the order asked for. Only the places that predict a continuation go through the vocabulary head, ROWS at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.models.gpt import GPT

WIDTH = 32  # a batch is filled up to a multiple of this: few shapes, or a CPU's allocator keeps memory for each
ROWS = 1024  # of logits at once


class Request(NamedTuple):
    """What stands before, at least one token, and what is scored; all but the last one must fit into the model."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    log_probability: float  # of the whole continuation given the context, in nats
    is_greedy: bool  # whether each of its tokens is the likeliest one where it stands


@torch.inference_mode()
def likelihoods(model: GPT, requests: Sequence[Request], batch_size: int) -> list[Likelihood]:
    """Of each request. The model must be in `eval()`."""
    lengths = [len(request.context) + len(request.continuation) - 1 for request in requests]
    order = sorted(range(len(requests)), key=lambda number: -lengths[number])
    found: dict[int, Likelihood] = {}
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        longest = max(lengths[numbers[0]], 1)
        width = min(-(-longest // WIDTH) * WIDTH, max(model.max_length, longest))
        batch = _batch_likelihoods(model, [requests[number] for number in numbers], width)
        found.update(zip(numbers, batch, strict=True))
    return [found[number] for number in range(len(requests))]


def _batch_likelihoods(model: GPT, requests: list[Request], width: int) -> list[Likelihood]:
    inputs, scored = torch.zeros(len(requests), width, dtype=torch.int64), torch.zeros(len(requests), width).bool()
    targets: list[int] = []
    for row, (context, continuation) in enumerate(requests):
        ids = [*context, *continuation]
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        scored[row, len(context) - 1 : len(ids) - 1] = True
        targets += continuation
    device = next(model.parameters()).device
    states = model.states(inputs.to(device), width)[scored.to(device)]  # (N, H): row by row, as the targets
    chances, greedy = _of_targets(model, states, torch.tensor(targets, dtype=torch.int64, device=device))
    counts = [len(request.continuation) for request in requests]
    parts = zip(chances.split(counts), greedy.split(counts), strict=True)
    return [Likelihood(chance.sum().item(), bool(right.all())) for chance, right in parts]


def _of_targets(model: GPT, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) float64 of the targets, and whether each is the likeliest token. states (N, H)."""
    chances, greedy = [], []
    for part, wanted in zip(states.split(ROWS), targets.split(ROWS), strict=True):
        logits = model.head.logits(part[None])[0]
        chances.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0].double())
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(chances).cpu(), torch.cat(greedy).cpu()
