"""What an encoder-decoder writes for a source, by beam search, and how near that is to the target that was wanted.

Quality is BLEU (Papineni et al. 2002, by sacrebleu with its standard tokenizer, 0 to 100), and the share of targets that are
met exactly. Beside each stands what copying the source would get.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.beams import Hypothesis, beam_search
from pretrain.config.run import Config
from pretrain.data.manifest import Manifest
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.loading import Loaded
from pretrain.models.transformer import EncoderDecoder
from pretrain.tasks.pairs import Pair, read_pairs, read_sources
from pretrain.tokenization.base import Tokenizer
from pretrain.validation import Result

TABLES = (".tsv", ".csv", ".jsonl")


class Search(NamedTuple):
    """As the 2017 Transformer's (Vaswani et al. 2017, section 6.1)."""

    beams: int = 4
    length_penalty: float = 0.6


class TargetStep:
    """What the model, which must be in `eval()`, says of the next token of K targets of one source: a step of beam search."""

    def __init__(self, model: EncoderDecoder, source: Sequence[int]) -> None:
        """source: ids with their end."""
        self.model, self.device = model, next(model.parameters()).device
        self.memory = model.encode(torch.tensor([list(source)], device=self.device))
        self.caches, self.seen = model.make_caches(self.memory, model.max_length), 0

    def logits(self, tokens: Tensor) -> Tensor:
        """(K, V) float32 of what follows once tokens (K, T) stand behind the targets."""
        logits = self.model.logits(tokens.to(self.device), self.memory, self.caches, first=self.seen)[:, -1]
        self.seen += tokens.shape[1]
        return logits

    def __call__(self, tokens: Tensor) -> Tensor:
        """The same as log-probabilities."""
        return self.logits(tokens).log_softmax(-1)

    def reorder(self, index: Tensor) -> None:
        for cache in self.caches.values():
            cache.reorder(index)


@torch.inference_mode()
def translate(model: EncoderDecoder, source: Sequence[int], eos: int, search: Search) -> Hypothesis:
    """The best target that is found for the ids of a source, which have no end."""
    step = TargetStep(model, [*source, eos])
    penalty = search.length_penalty if search.beams > 1 else 0.0
    return beam_search(step, search.beams, [eos], model.max_length, eos, penalty)[0]


class Written(NamedTuple):
    """A source, what was written for it, with its score (log-probability by length penalty), and what was wanted."""

    source: str
    text: str
    score: float
    wanted: str | None


def write_targets(
    model: EncoderDecoder, tokenizer: Tokenizer, pairs: Iterable[tuple[str, str | None]], search: Search
) -> Iterator[Written]:
    """For each pair in turn. A source that is longer than the model's is cut at its end."""
    longest = model.encoder.max_length - 1
    for source, wanted in pairs:
        best = translate(model, tokenizer.encode(source)[:longest], tokenizer.eos, search)
        yield Written(source, tokenizer.decode(best.tokens), best.score, wanted)


def pairs_in(stream: Stream, source_length: int, count: int | None = None) -> Iterator[tuple[str, str]]:
    """The pairs of shards of packed rows as text, in the shards' order, at most `count`."""
    tokenizer, eos, given = stream.manifests[0].tokenizer(), stream.eos, 0
    for number in range(stream.samples_per_epoch):
        row = stream.read(np.array([number]))[0, :-1]
        sides = [_split(row[:source_length], eos), _split(row[source_length:], eos)]
        for source, target in zip(*sides, strict=True):
            if count is not None and given >= count:
                return
            given += 1
            yield tokenizer.decode(source), tokenizer.decode(target)


class Translations:
    """The first held-out pairs, which a run's model writes targets for at each validation."""

    def __init__(self, stream: Stream, source_length: int, count: int) -> None:
        self.pairs = list(pairs_in(stream, source_length, count))

    def judge(self, model: EncoderDecoder, tokenizer: Tokenizer, result: Result) -> Result:
        """The result with BLEU and exact matches behind its scores."""
        scores = scores_of(list(write_targets(model, tokenizer, self.pairs, Search())))
        floor = {name.removeprefix("floor_"): value for name, value in scores.items() if name.startswith("floor_")}
        return result._replace(scores={**result.scores, **{name: scores[name] for name in floor}}, floor=floor)


def _split(side: Iterable[int], eos: int) -> list[list[int]]:
    """The pairs' ids of one side of a row, without their ends: an end behind an end fills the side."""
    found: list[list[int]] = []
    ids: list[int] = []
    for token in map(int, side):
        if token != eos:
            ids.append(token)
        elif ids:
            found.append(ids)
            ids = []
    return found


def scores_of(written: Sequence[Written]) -> dict[str, float]:
    """BLEU (0 to 100) and exact matches (0 to 1) of what was written, and of copies of the sources."""
    wanted = [one.wanted or "" for one in written]
    ours, copies = [one.text for one in written], [one.source for one in written]
    return {
        "bleu": bleu(ours, wanted),
        "exact_match": _exact(ours, wanted),
        "floor_bleu": bleu(copies, wanted),
        "floor_exact_match": _exact(copies, wanted),
    }


def bleu(texts: Sequence[str], wanted: Sequence[str]) -> float:
    """Of a corpus, one reference a text. Raises UserError where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError("BLEU needs sacrebleu; install it: pip install 'pretrain-engine[finetune]'") from None
    return min(float(BLEU().corpus_score(list(texts), [list(wanted)]).score), 100.0)


def _exact(texts: Sequence[str], wanted: Sequence[str]) -> float:
    return sum(text == other for text, other in zip(texts, wanted, strict=True)) / max(len(texts), 1)


# -- commands ----------------------------------------------------------------------------------------------------------


def search_of(args: Namespace) -> Search:
    """Of --beams and --length-penalty. Raises UserError."""
    beams = Search().beams if args.beams is None else args.beams
    penalty = Search().length_penalty if args.length_penalty is None else args.length_penalty
    problems = [] if beams >= 1 else [f"--beams {beams}: give at least 1"]
    if not 0 <= penalty < math.inf:
        problems.append(f"--length-penalty {penalty}: give 0 (none) or more; 0.6 is usual")
    elif beams == 1 and args.length_penalty:
        problems.append("--length-penalty: no effect with --beams 1, which follows one hypothesis to its end")
    if problems:
        raise UserError("\n".join(problems))
    return Search(beams, penalty)


def refuse_search(args: Namespace, why: str) -> None:
    """Raises UserError where --beams or --length-penalty is given to what searches nothing."""
    given = [name for name in ("beams", "length_penalty") if getattr(args, name) is not None]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{names}: no effect, {why}; leave them out")


def read_source_file(path: Path) -> Iterator[Pair]:
    """Sources to predict for: of a table the first column (JSON lines: "source"), of any other text a source a line."""
    return read_pairs(path, labelled=False) if path.suffix.lower() in TABLES else read_sources(path)


def evaluate(loaded: Loaded, data: Path, search: Search) -> dict[str, float]:
    """Loss and accuracy of the targets' tokens, BLEU and exact matches of what is written, on pairs: of a file, or shards."""
    model, tokenizer, config = loaded.model, loaded.tokenizer, loaded.config
    assert isinstance(model, EncoderDecoder)
    pairs = list(_pairs_of(data, config))
    losses = torch.zeros(2, dtype=torch.float64)
    tokens = 0
    for source, target in pairs:
        found, count = _forced(model, tokenizer, source, target)
        losses, tokens = losses + found, tokens + count
    loss, accuracy = (losses / max(tokens, 1)).tolist()
    scores = scores_of(list(write_targets(model, tokenizer, pairs, search)))
    return {"loss": loss, "accuracy": accuracy, **scores, "tokens": tokens, "pairs": len(pairs), "step": loaded.step}


def _pairs_of(data: Path, config: Config) -> Iterator[tuple[str, str]]:
    if not data.is_dir():
        for pair in read_pairs(data):
            assert pair.target is not None
            yield pair.source, pair.target
        return
    lengths = Manifest.load(data).pairs
    if lengths is None:
        raise UserError(f"--data {data}: holds text, not pairs; make such shards with `pretrain prepare --pairs`")
    yield from pairs_in(Stream([data], sum(lengths), config.data_seed, shuffle=False), lengths[0])


@torch.inference_mode()
def _forced(model: EncoderDecoder, tokenizer: Tokenizer, source: str, target: str) -> tuple[Tensor, int]:
    """Loss summed over the target's tokens and how many of them are likeliest, given those before; and their number."""
    eos, device = tokenizer.eos, next(model.parameters()).device
    ids = tokenizer.encode(source)[: model.encoder.max_length - 1], tokenizer.encode(target)[: model.max_length - 1]
    targets = torch.tensor([[*ids[1], eos]], device=device)
    inputs = torch.tensor([[*ids[0], eos, eos, *ids[1]]], device=device)
    return model(inputs, targets, torch.ones_like(targets).float(), None).double().cpu(), targets.shape[1]
