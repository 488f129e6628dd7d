"""Text from a trained model with a key/value cache: drawn and printed as it comes, or the likeliest by beam search."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels import noise
from pretrain.beams import Step, beam_search
from pretrain.config.run import an
from pretrain.errors import UserError
from pretrain.finetuning.instruction import Instruction
from pretrain.loading import Loaded, load_model
from pretrain.models.gpt import GPT
from pretrain.models.transformer import EncoderDecoder
from pretrain.tokenization.base import Tokenizer
from pretrain.translation import TargetStep

DRAWING = ("temperature", "top_k", "top_p", "seed")  # fields of Sampling that the command has options for
TEMPERATURE, LENGTH_PENALTY = 0.8, 0.6  # the command's, where none is given


class Sampling(NamedTuple):
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # sample among the k likeliest; 0 for all
    top_p: float = 1.0  # sample among the fewest tokens whose probability reaches p (Holtzman et al. 2020)
    seed: int = 1


class Growing(Step, Protocol):
    """A step of beam search that gives logits as well: what a draw needs."""

    def logits(self, tokens: Tensor) -> Tensor:
        """(K, V) float32 of what follows once tokens (K, T) stand behind what was seen."""


class Continuation:
    """What the model, which must be in `eval()`, says of the next token of K texts of equal length that grow side by side:
    a step of beam search. It begins with one empty text.

    Past the model's length a text goes on from its last half, as the model can see no more at once.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.ids = torch.empty(1, 0, dtype=torch.int64)  # (K, S) that the model sees
        self.caches, self.seen = model.make_caches(1, model.max_length), 0

    def logits(self, tokens: Tensor) -> Tensor:
        """(K, V) float32 of what follows once tokens (K, T) stand behind the texts."""
        length = self.model.max_length
        self.ids = torch.cat((self.ids, tokens if self.seen else tokens[:, -length:]), dim=1)
        if self.ids.shape[1] > length:
            self.ids = self.ids[:, -max(length // 2, 1) :]
            self.caches, self.seen = self.model.make_caches(len(self.ids), length), 0
        window = self.ids[:, self.seen :].to(next(self.model.parameters()).device)
        logits = self.model.logits(window, self.caches, first=self.seen)[:, -1]
        self.seen = self.ids.shape[1]
        return logits

    def __call__(self, tokens: Tensor) -> Tensor:
        """The same as log-probabilities."""
        return self.logits(tokens).log_softmax(-1)

    def reorder(self, index: Tensor) -> None:
        """Text i becomes what index[i] was."""
        self.ids = self.ids[index]
        for cache in self.caches.values():
            cache.reorder(index)


def generate(model: GPT, prompt: list[int], max_tokens: int, sampling: Sampling, stop: int | None) -> Iterator[int]:
    """Token ids after the prompt, one at a time, until `stop` or `max_tokens`. The model must be in `eval()`."""
    yield from draw(Continuation(model), prompt, max_tokens, sampling, stop)


@torch.inference_mode()
def draw(text: Growing, start: list[int], max_tokens: int, sampling: Sampling, stop: int | None) -> Iterator[int]:
    """The same of a text that begins with `start`."""
    tokens = torch.tensor([start])
    for place in range(max_tokens):
        token = choose(text.logits(tokens)[0], sampling, place)
        if token == stop:
            return
        tokens = torch.tensor([[token]])
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
    problems = _beam_problems(args)
    if args.temperature is not None and args.temperature < 0:
        problems.append(f"--temperature {args.temperature}: give 0 (always the likeliest) or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        problems.append(f"--top-p {args.top_p}: give a probability above 0 and at most 1")
    if args.top_k is not None and args.top_k < 0:
        problems.append(f"--top-k {args.top_k}: give 0 (no limit) or a count")
    if args.max_tokens < 1 or (args.num_samples is not None and args.num_samples < 1):
        problems.append("--max-tokens and --num-samples: give at least 1")
    if problems:
        raise UserError("\n".join(problems))


def _beam_problems(args: Namespace) -> list[str]:
    if args.beams is None:
        return [] if args.length_penalty is None else ["--length-penalty: ranks what --beams finds; give --beams too"]
    problems = [] if args.beams >= 1 else [f"--beams {args.beams}: give at least 1"]
    drawing = [name for name in (*DRAWING, "num_samples") if getattr(args, name) is not None]
    if drawing:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in drawing)
        problems.append(f"{names}: no effect with --beams, which draws nothing; leave out one or the other")
    if args.length_penalty is not None and not 0 <= args.length_penalty < math.inf:
        problems.append(f"--length-penalty {args.length_penalty}: give 0 (none) or more; 0.6 is usual")
    elif args.length_penalty and args.beams == 1:
        problems.append("--length-penalty: no effect with --beams 1, which follows one hypothesis to its end")
    return problems


class Beginning(NamedTuple):
    """Where a text of a run's model starts."""

    make: Callable[[], Growing]
    start: list[int]  # ids
    shown: str  # of it
    longest: int  # tokens

    @classmethod
    def of(cls, loaded: Loaded, prompt: str, max_tokens: int, raw: bool = False) -> Beginning:
        """A decoder goes on with the prompt, one that was tuned on instructions with its template around it (unless raw), of
        which nothing is shown; an encoder-decoder writes a target for it. Raises UserError for an encoder."""
        model, tokenizer = loaded.model, loaded.tokenizer
        instructed = loaded.task if isinstance(loaded.task, Instruction) else None
        if raw and instructed is None:
            raise UserError("--raw: has no effect on a model that was not tuned on instructions; leave it out")
        asked = prompt if instructed is None or raw else instructed.chat.asked(prompt)
        ids, eos = tokenizer.encode(asked), tokenizer.eos
        if isinstance(model, GPT):
            decoder, shown = model, prompt if asked == prompt else ""
            return cls(lambda: Continuation(decoder), ids or [eos], shown, max_tokens)
        if isinstance(model, EncoderDecoder):
            both, source = model, [*ids[: model.encoder.max_length - 1], eos]
            return cls(lambda: TargetStep(both, source), [eos], "", min(max_tokens, model.max_length))
        kind = loaded.config.model.kind
        raise UserError(f"{loaded.config.run.dir}: {an(kind)} sees both sides of a token, so it writes no text")


def main(args: Namespace) -> int:
    """`python -m pretrain generate`."""
    check_options(args)
    loaded = load_model(Path(args.run_folder), args.checkpoint)
    begin, tokenizer = Beginning.of(loaded, args.prompt, args.max_tokens, args.raw), loaded.tokenizer
    if args.beams is not None:
        penalty = LENGTH_PENALTY if args.length_penalty is None else args.length_penalty
        best = beam_search(begin.make(), args.beams, begin.start, begin.longest, tokenizer.eos, penalty)[0]
        print(begin.shown + tokenizer.decode(best.tokens))
    else:
        _print_samples(begin, tokenizer, args)
    return 0


def _print_samples(begin: Beginning, tokenizer: Tokenizer, args: Namespace) -> None:
    given = {name: value for name in DRAWING if (value := getattr(args, name)) is not None}
    sampling = Sampling(**{"temperature": TEMPERATURE, **given})
    num_samples = args.num_samples or 1
    for number in range(num_samples):
        if num_samples > 1:
            print(f"--- {number + 1} of {num_samples}")
        sys.stdout.write(begin.shown)
        drawn = sampling._replace(seed=sampling.seed + number)
        ids = draw(begin.make(), begin.start, begin.longest, drawn, tokenizer.eos)
        for text in stream_text(tokenizer, ids):
            sys.stdout.write(text)
            sys.stdout.flush()
        print()
