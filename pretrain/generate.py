"""Text from a trained model: sampling with a key/value cache, printed as it comes."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import noise
from pretrain.errors import UserError
from pretrain.loading import load_model
from pretrain.models.gpt import GPT
from pretrain.tokenization.base import Tokenizer


class Sampling(NamedTuple):
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # sample among the k likeliest; 0 for all
    top_p: float = 1.0  # sample among the fewest tokens whose probability reaches p (Holtzman et al. 2020)
    seed: int = 1


@torch.inference_mode()
def generate(model: GPT, prompt: list[int], max_tokens: int, sampling: Sampling, stop: int | None) -> Iterator[int]:
    """Token ids after the prompt, one at a time, until `stop` or `max_tokens`. The model must be in `eval()`.

    Past the model's length the text goes on from its last half, as the model can see no more at once.
    """
    length = model.max_length
    device = next(model.parameters()).device
    ids = prompt[-length:]
    caches, seen = model.make_caches(1, length), 0
    for place in range(max_tokens):
        if len(ids) > length:
            ids, caches, seen = ids[-max(length // 2, 1) :], model.make_caches(1, length), 0
        window = torch.tensor([ids[seen:]], device=device)
        logits = model.logits(window, caches, first=seen)[0, -1]
        seen = len(ids)
        token = choose(logits, sampling, place)
        if token == stop:
            return
        ids.append(token)
        yield token


def choose(logits: Tensor, sampling: Sampling, place: int) -> int:
    """Draw from logits (V,). The draw is a function of (seed, place), as all randomness here."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Cut, not masked: of tokens as likely as the k-th the first stay, and what is cut away can never be drawn.
    logits, order = (logits.float() / sampling.temperature).sort(descending=True, stable=True)
    probabilities = logits[: sampling.top_k or None].softmax(-1).double()
    sums = probabilities.cumsum(-1)
    if sampling.top_p < 1:
        sums = sums[: int((sums - probabilities < sampling.top_p).sum())]  # the first always stays
    drawn = noise.key(sampling.seed, "generate", place) / 2**31 * sums[-1]  # below the last sum, also when rounded
    return int(order[int(torch.searchsorted(sums, drawn, right=True))])


def stream_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """The text of tokens as they come; bytes of an unfinished character wait for the rest."""
    kept: list[int] = []
    shown = ""
    for token in ids:
        kept.append(token)
        text = tokenizer.decode(kept)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(kept)[len(shown) :] if kept else ""
    if rest:
        yield rest


def sample_text(model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int, sampling: Sampling) -> str:
    """The prompt and what the model, which must be in `eval()`, makes of it."""
    ids = tokenizer.encode(prompt) or [tokenizer.eos]
    return prompt + "".join(stream_text(tokenizer, generate(model, ids, max_tokens, sampling, tokenizer.eos)))


def check_options(args: Namespace) -> None:
    """All that is wrong with the command line, in one message."""
    problems = []
    if args.temperature < 0:
        problems.append(f"--temperature {args.temperature}: give 0 (always the likeliest) or more")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top-p {args.top_p}: give a probability above 0 and at most 1")
    if args.top_k < 0:
        problems.append(f"--top-k {args.top_k}: give 0 (no limit) or a count")
    if args.max_tokens < 1 or args.num_samples < 1:
        problems.append("--max-tokens and --num-samples: give at least 1")
    if problems:
        raise UserError("\n".join(problems))


def main(args: Namespace) -> int:
    """`python -m pretrain generate`."""
    check_options(args)
    loaded = load_model(Path(args.run_folder), args.checkpoint)
    model = loaded.model
    if not isinstance(model, GPT):
        raise UserError(
            f"{args.run_folder}: a {loaded.config.model.kind} sees both sides of a token, so it writes no text"
        )
    prompt = loaded.tokenizer.encode(args.prompt) or [loaded.tokenizer.eos]
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- {number + 1} of {args.num_samples}")
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed + number)
        sys.stdout.write(args.prompt)
        ids = generate(model, prompt, args.max_tokens, sampling, loaded.tokenizer.eos)
        for text in stream_text(loaded.tokenizer, ids):
            sys.stdout.write(text)
            sys.stdout.flush()
        print()
    return 0
