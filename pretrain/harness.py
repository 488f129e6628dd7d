"""Runs in EleutherAI's lm-evaluation-harness (optional: `pip install 'pretrain-engine[harness]'`).

`python -m pretrain harness RUN --tasks lambada_openai --num_fewshot 5` is lm-eval's own command with a run as its model: all
of its options can stand there. In Python: `lm_eval.simple_evaluate(HarnessLM("runs/mine"), tasks=["lambada_openai"])`.

Texts are encoded by the harness's rules, so that figures compare with those of other models in it: a context and what is to
be scored are encoded as one text and cut where the context's own tokens end; spaces at the context's end go to what is scored;
a document end stands before an empty context alone, unless `add_bos_token` puts it before every one.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.errors import UserError
from pretrain.fewshot import encode_pair
from pretrain.generate import Sampling, generate
from pretrain.likelihood import Likelihood, Request, likelihoods
from pretrain.loading import load_model
from pretrain.models.gpt import GPT

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness is not installed ({error}): pip install 'pretrain-engine[harness]'"
    ) from error

NAME = "pretrain"  # lm-eval's --model
MAX_TOKENS = 256  # that are generated where a task does not say, as elsewhere in the harness
LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names of one thing; the first counts


@register_model(NAME)
class HarnessLM(LM):  # type: ignore[misc]
    """The model of a run, as lm-eval sees models. checkpoint: its step, or the newest. batch_size: sequences at once.

    Raises UserError for a run that does not continue texts, and for what cannot be done as asked.
    """

    def __init__(
        self,
        run: str | Path,
        checkpoint: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        add_bos_token: bool = False,
    ) -> None:
        super().__init__()
        loaded = load_model(Path(run), checkpoint)
        if not isinstance(loaded.model, GPT):
            raise UserError(
                f"{run}: a {loaded.config.model.kind} does not continue texts; give a run of model.kind gpt"
            )
        self.model = loaded.model.to(_device(device) or next(loaded.model.parameters()).device)
        self.loaded, self.pieces, self.add_bos_token = loaded, loaded.tokenizer, add_bos_token
        self.max_length, self.batch_size = loaded.model.max_length, _batch_size(batch_size, max_batch_size)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches."""
        return f"{self.pieces.file}-{self.pieces.sha256}"

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each request's (context, continuation): the continuation's log-probability, and whether it is greedy's."""
        found = self._score([self._encode(*request.args) for request in requests])
        results = [(one.log_probability, one.is_greedy) for one in found]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each request's (text,): its log-probability, every token once, the last window as long as can be."""
        windows = [list(self._windows(self._ids(request.args[0]))) for request in requests]
        found = iter(self._score([window for each in windows for window in each]))
        results = [sum(next(found).log_probability for _ in each) for each in windows]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each request's (context, options): what the model goes on with, up to a stop text, which is left out."""
        results = []
        for number, request in enumerate(requests):
            context, options = request.args
            results.append(self._continue(context, options, number))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _ids(self, text: str) -> list[int]:
        return [self.pieces.eos] * self.add_bos_token + self.pieces.encode(text)

    def _encode(self, context: str, continuation: str) -> Request:
        """By the harness's rules (`TemplateLM._encode_pair`), but that a continuation is never left without tokens: where
        its beginning became one piece with the context's end, that piece is scored."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        before = self._ids(bare) if bare else []
        after = [*self._ids(bare + continuation)[len(before) :]] if bare else self.pieces.encode(continuation)
        if not after:
            before, after = encode_pair(self.pieces, bare, continuation)
        return Request(before or [self.pieces.eos], after)

    def _windows(self, ids: Sequence[int]) -> Iterator[Request]:
        """Each token once; windows follow each other, but the last one begins as early as the model's length lets it."""
        length = self.max_length
        for first in range(0, len(ids), length):
            last = min(first + length, len(ids))
            before = [self.pieces.eos] if first == 0 else ids[max(last - length - 1, 0) : first]
            yield Request(before, ids[first:last])

    def _score(self, requests: Sequence[Request]) -> list[Likelihood]:
        fitted = []
        for context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens, more than the {self.max_length} that the model sees"
                )
            fitted.append(Request(context[-room:], continuation))
        return likelihoods(self.model, fitted, self.batch_size)

    def _continue(self, context: str, options: Mapping[str, Any], number: int) -> str:
        sampling, stops, max_tokens = generation_options(options, number)
        room = max(self.max_length - max_tokens, self.max_length // 2, 1)
        prompt = self._ids(context)[-room:] or [self.pieces.eos]
        kept: list[int] = []
        text = ""
        for token in generate(self.model, prompt, max_tokens, sampling, self.pieces.eos):
            kept.append(token)
            text = self.pieces.decode(kept)
            if ends := [place for stop in stops if (place := text.find(stop)) >= 0]:
                return text[: min(ends)]
        return text


def generation_options(options: Mapping[str, Any], number: int) -> tuple[Sampling, list[str], int]:
    """How to draw, the texts that end it, and the tokens at most, of a task's options. Greedy unless they say otherwise.

    number: of the request, which seeds what is drawn. Raises UserError for an option that would have to change the text.
    """
    rest = dict(options)
    until = rest.pop("until", None) or []
    lengths = [rest.pop(name) for name in LENGTHS if rest.get(name) is not None]
    given, draws = rest.pop("temperature", None), rest.pop("do_sample", None)
    temperature = (1.0 if draws else 0.0) if given is None or draws is False else float(given)
    top_k, top_p = rest.pop("top_k", None) or 0, rest.pop("top_p", None) or 1.0
    if rest:
        raise UserError(f"generation options {', '.join(map(repr, rest))}: not known here; leave them out of the task")
    stops = [until] if isinstance(until, str) else list(until)
    sampling = Sampling(temperature, int(top_k), float(top_p), number)
    return sampling, [stop for stop in stops if stop], int(lengths[0]) if lengths else MAX_TOKENS


def _batch_size(size: int | str | None, most: int | None) -> int:
    text = "1" if size is None else str(size)
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch_size {size}: give a number of sequences, at least 1")
    return min(int(text), most or int(text))


def _device(name: str | None) -> torch.device | None:
    """None for the one that the model is on: lm-eval's command asks for cuda:0 by itself, also where there is none."""
    if name is None or (name.startswith("cuda") and not torch.cuda.is_available()):
        return None
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: give cpu, or cuda:0 and the like") from error


def main(args: Namespace) -> int:
    """`python -m pretrain harness`: lm-eval's command, with the run as its model."""
    from lm_eval.__main__ import cli_evaluate

    model = {"run": args.run_folder} | ({} if args.checkpoint is None else {"checkpoint": args.checkpoint})
    sys.argv = ["lm-eval", "run", "--model", NAME, "--model_args", json.dumps(model), *args.of_lm_eval]
    cli_evaluate()
    return 0
