"""Beam search: the likeliest continuations of one start, K hypotheses side by side. It knows no model, only its `Step`.

Each step extends every running hypothesis by every token and looks at the K likeliest of what comes out. Those of them that
end are finished; the K likeliest that do not end run on, so that the beam stays K wide (as fairseq and transformers have it).
Finished hypotheses are ranked by their score, log P(Y) / lp(Y), with the length penalty of Wu et al. 2016 (GNMT, equation
14; its coverage penalty is left out):

    lp(Y) = ((5 + |Y|) / 6) ^ alpha        |Y|: tokens after the start, the one that ends the text among them

With alpha 0 a score is the log-probability, which is for short texts; 0.6 is the 2017 Transformer's. A log-probability only
falls, so the best that a running hypothesis can come to is what it has now, at the longest length. The search ends when that
is no better than the worst of the `num_best` finished ones: more steps would change nothing. One beam is greedy search: it
ends where its hypothesis does.

Shapes: K running hypotheses, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Step(Protocol):
    """A model that follows K hypotheses, which are of equal length, and remembers what it has seen of them."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """(K, V) log-probabilities of what follows once tokens (K, T) int64 stand behind what was seen. The first call
        has K = 1 and the start, later ones T = 1."""

    def reorder(self, index: Tensor) -> None:
        """From now on hypothesis i is what index[i] was: (K,) int64 of the former ones, some left out, some taken twice."""


class Hypothesis(NamedTuple):
    tokens: list[int]  # behind the start, without the one that ends the text
    score: float  # log-probability / length penalty
    log_probability: float  # in nats, of the end too
    finished: bool  # ended by itself; else cut at max_tokens


class _Beam(NamedTuple):
    """The running hypotheses: (K, t) tokens behind the start, (K,) float64 sums of log-probabilities."""

    tokens: Tensor
    sums: Tensor


class _Candidates(NamedTuple):
    """Extended hypotheses, the likeliest first: which it extends, by which token, and its log-probability."""

    parents: Tensor
    tokens: Tensor
    sums: Tensor


@torch.inference_mode()
def beam_search(
    step: Step,
    num_beams: int,
    start: Sequence[int],
    max_tokens: int,
    eos: int | None,
    length_penalty: float = 0.0,
    num_best: int = 1,
) -> list[Hypothesis]:
    """The `num_best` best of what the search finds, at most num_beams, the best first; fewer where there are not so many.

    start: at least one token; eos: the token that ends a text, None: none does; length_penalty: alpha, at least 0. At
    max_tokens the running hypotheses are taken as they are. Equally likely ones come in the order of their last tokens' ids.
    """
    _check(num_beams, start, max_tokens, length_penalty, num_best)
    finished: list[Hypothesis] = []
    beam = _Beam(torch.empty(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.float64))
    chances = step(torch.tensor([list(start)]))
    for length in range(1, max_tokens + 1):
        found = _likeliest(beam.sums, chances, 2 * num_beams)
        ends = torch.zeros_like(found.tokens, dtype=torch.bool) if eos is None else found.tokens == eos
        for place in ends[:num_beams].nonzero().flatten().tolist():
            tokens = beam.tokens[found.parents[place]]
            finished.append(_hypothesis(tokens, found.sums[place], length, length_penalty, True))
        kept = (~ends).nonzero().flatten()[:num_beams]
        index = found.parents[kept]
        beam = _Beam(torch.cat((beam.tokens[index], found.tokens[kept, None]), dim=1), found.sums[kept])
        if _is_over(finished, beam, num_beams, num_best, max_tokens, length_penalty):
            break
        if length < max_tokens:
            step.reorder(index)
            chances = step(beam.tokens[:, -1:])
    else:
        for tokens, total in zip(beam.tokens, beam.sums, strict=True):
            finished.append(_hypothesis(tokens, total, max_tokens, length_penalty, False))
    return sorted(finished, key=lambda hypothesis: -hypothesis.score)[:num_best]


def _check(num_beams: int, start: Sequence[int], max_tokens: int, length_penalty: float, num_best: int) -> None:
    if not 1 <= num_best <= num_beams:
        raise ValueError(f"the best {num_best} of {num_beams} beams were asked for; give 1 <= num_best <= num_beams")
    if not start or max_tokens < 1 or length_penalty < 0:
        raise ValueError(
            f"a search needs a start, a max_tokens of at least 1 and a length penalty of at least 0; found "
            f"{len(start)} tokens, {max_tokens} and {length_penalty}"
        )


def _likeliest(sums: Tensor, chances: Tensor, count: int) -> _Candidates:
    """The `count` likeliest of all extensions, impossible ones left out. sums (K,), chances (K, V)."""
    totals = sums.to(chances.device)[:, None] + chances.double()
    flat = totals.T.flatten()  # (V K): by token, then by hypothesis
    # topk keeps any of several equal ones: it only says how likely one must be.
    least = flat.topk(min(count, len(flat))).values[-1]
    places = ((flat >= least) & (flat > -torch.inf)).nonzero().flatten()
    places = places[flat[places].sort(descending=True, stable=True).indices][:count]
    sums, places = flat[places].cpu(), places.cpu()
    return _Candidates(places % len(totals), places // len(totals), sums)


def _penalty(length: int, alpha: float) -> float:
    return float(((5 + length) / 6) ** alpha)


def _hypothesis(tokens: Tensor, total: Tensor, length: int, alpha: float, finished: bool) -> Hypothesis:
    return Hypothesis(tokens.tolist(), total.item() / _penalty(length, alpha), total.item(), finished)


def _is_over(
    finished: list[Hypothesis], beam: _Beam, num_beams: int, num_best: int, max_tokens: int, alpha: float
) -> bool:
    """Whether what runs cannot come to be among the best any more."""
    if not len(beam.sums) or (num_beams == 1 and finished):
        return True
    if len(finished) < num_best:
        return False
    worst = sorted((hypothesis.score for hypothesis in finished), reverse=True)[num_best - 1]
    return beam.sums[0].item() / _penalty(max_tokens, alpha) <= worst
