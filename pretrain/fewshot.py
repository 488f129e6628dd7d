"""`python -m pretrain evaluate --task`: what a causal model does of a task that it was not tuned for (Brown et al. 2020).

Each item stands behind K solved examples, drawn by (seed, item) from a file of them, or from the task's own without the item
itself. Multiple choice goes to the choice of the highest score (section 2.4): its log-probability behind the prompt, as it is
("none"), for each of its tokens or bytes, or less its log-probability behind "Answer:" alone ("unconditional"). A cloze is
right if the target is what greedy search writes, as in LAMBADA.

A document end stands before the first example, as before every document in training. What is longer than the model loses its
first examples, as many as it must and all choices alike; where the item alone is too long, its beginning. Both are counted.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.order import key, permute
from pretrain.errors import UserError
from pretrain.likelihood import Likelihood, Request, likelihoods
from pretrain.loading import Loaded
from pretrain.models.gpt import GPT
from pretrain.tasks.floors import commonest
from pretrain.tasks.lines import Findings, excerpt, fail
from pretrain.tasks.prompts import ANSWER, Item, context_of, continued, read_items
from pretrain.tasks.trials import mean, standard_deviation
from pretrain.tokenization.base import Tokenizer

NORMALIZATIONS = ("none", "tokens", "bytes", "unconditional")
POOL = 256  # items whose requests are held at once
SHOTS = 0x5407  # the purpose of the draw of examples
LEFT_OUT = "item with examples left out, since the prompt was longer than the model"
CUT = "prompt without its beginning, since it was longer than the model"


class Task(NamedTuple):
    """The items of a file, and the pool that their examples are from; own: it is the file itself."""

    path: Path
    is_choice: bool
    items: list[Item]
    pool: list[Item]
    own: bool
    shots: int
    seed: int


class Prepared(NamedTuple):
    """An item's requests: each continuation behind the prompt, then, for multiple choice, each behind "Answer:"."""

    requests: list[Request]
    left_out: int  # examples


class Scored(NamedTuple):
    """By normalisation, whether the item is right; and the log-probability of its right answer."""

    right: dict[str, bool]
    log_probability: float
    left_out: int


def evaluate(loaded: Loaded, args: Namespace) -> dict[str, Any]:
    """Accuracy, what is reached without learning, and how it was asked; by the command's options."""
    if loaded.task is not None or not isinstance(loaded.model, GPT):
        kind = loaded.config.model.kind if loaded.task is None else loaded.config.objective.kind
        raise UserError(
            f"{args.run_folder}: a model for {kind}; --task needs one that continues a prompt: model.kind gpt, "
            "objective.kind causal"
        )
    task, findings = open_task(args), Findings()
    if args.normalize is not None and not task.is_choice:
        raise UserError(f"--normalize: no effect on {task.path}, which has no choices; leave it out")
    scored = list(score(loaded.model, loaded.tokenizer, task, args.batch_size, findings))
    for text in findings.sentences():
        print(f"note: {text}", file=sys.stderr)
    told = {"examples": len(task.items), "shots": task.shots, "seed": task.seed}
    left_out = {"left_out_shots": sum(item.left_out for item in scored), "cut_prompts": findings.counts.get(CUT, 0)}
    return {**summary(task, scored, args.normalize), **told, **left_out, "step": loaded.step}


def open_task(args: Namespace) -> Task:
    """The files that the options name. Raises UserError, with file and line where there is one."""
    path, shots, seed = Path(args.task), args.shots or 0, 1 if args.seed is None else args.seed
    if shots < 0:
        raise UserError(f"--shots {shots}: give 0 or more examples")
    if not shots and (args.examples is not None or args.seed is not None):
        name = "--examples" if args.examples is not None else "--seed"
        raise UserError(f"{name}: no effect without examples before each item; give --shots, or leave it out")
    is_choice, items = read_items(path)
    own = args.examples is None or (Path(args.examples).exists() and Path(args.examples).samefile(path))
    pool_path = path if own else Path(args.examples)
    pool_is_choice, pool = (is_choice, items) if own else read_items(pool_path)
    if pool_is_choice != is_choice:
        raise UserError(
            f"--examples {pool_path}: not the same kind of task as {path}: one is multiple choice, one cloze"
        )
    if shots > len(pool) - own:
        without = ", without the item itself" if own else ""
        raise UserError(f"--shots {shots}: {pool_path} has {len(pool) - own} examples{without}; ask for no more")
    return Task(path, is_choice, items, pool, own, shots, seed)


def score(model: GPT, tokenizer: Tokenizer, task: Task, batch_size: int, findings: Findings) -> Iterator[Scored]:
    """Of each item, in order; a function of the item and the seed alone."""
    for first in range(0, len(task.items), POOL):
        items = task.items[first : first + POOL]
        prepared = [prepare(tokenizer, model.max_length, task, item, findings) for item in items]
        found = iter(likelihoods(model, [request for one in prepared for request in one.requests], batch_size))
        for item, (requests, left_out) in zip(items, prepared, strict=True):
            yield _scored(task, item, requests, [next(found) for _ in requests], left_out)


def prepare(tokenizer: Tokenizer, length: int, task: Task, item: Item, findings: Findings) -> Prepared:
    """The requests of an item for a model of so many positions."""
    examples = [task.pool[number] for number in draw(item.id, len(task.pool), task.shots, task.seed, task.own)]
    for left_out in range(task.shots + 1):
        whole = _requests(tokenizer, task, item, context_of(item, examples[left_out:]))
        requests = _fitted(task, item, whole, length)
        if requests == whole:
            break
    else:
        findings.add(task.path, item.line, CUT)
    if left_out:
        findings.add(task.path, item.line, LEFT_OUT)
    if task.is_choice:
        alone = [encode_pair(tokenizer, ANSWER, continued(ANSWER, text)) for text in item.continuations]
        behind = [Request([tokenizer.eos, *before], after) for before, after in alone]
        requests = requests + _fitted(task, item, behind, length)
    return Prepared(requests, left_out)


def draw(number: int, pool: int, shots: int, seed: int, own: bool) -> list[int]:
    """Which of a pool's examples stand before item `number`: a function of (seed, number); of more shots the first the same.

    own: the pool is the file of the item itself, which is left out.
    """
    places = permute(np.arange(shots), pool - own, key(seed, SHOTS, number))
    return [int(place + (own and place >= number)) for place in places]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The two encoded as one text, cut before the first piece that has something of the continuation.

    White space between them belongs to the continuation, as a word's piece begins with its space; so does a piece that
    holds the end of one and the beginning of the other.
    """
    ids, offsets = tokenizer.encode_with_offsets(context + continuation)
    end = len(context.rstrip())
    place = next((place for place, (_, last) in enumerate(offsets) if last > end), len(ids))
    return ids[:place], ids[place:]


def _requests(tokenizer: Tokenizer, task: Task, item: Item, context: str) -> list[Request]:
    requests = []
    for text in item.continuations:
        before, after = encode_pair(tokenizer, context, continued(item.prompt, text))
        if not after:
            fail(task.path, item.line, f"{excerpt(text)} is nothing to the model's tokenizer; give other words")
        requests.append(Request([tokenizer.eos, *before], after))
    return requests


def _fitted(task: Task, item: Item, requests: list[Request], length: int) -> list[Request]:
    """Without the beginnings of contexts that are too long; as much is kept for each choice as for the longest."""
    room = length + 1 - max(len(request.continuation) for request in requests)
    if room < 1:
        fail(task.path, item.line, f"an answer of more tokens than the {length} that the model sees; shorten it")
    return [request._replace(context=request.context[-room:]) for request in requests]


def _scored(task: Task, item: Item, requests: list[Request], found: list[Likelihood], left_out: int) -> Scored:
    if not task.is_choice:
        return Scored({"greedy": found[0].is_greedy}, found[0].log_probability, left_out)
    count = len(item.continuations)
    sums, alone = (np.array([one.log_probability for one in part]) for part in (found[:count], found[count:]))
    tokens = [len(request.continuation) for request in requests[:count]]
    scores = (sums, sums / tokens, sums / [len(text.encode()) for text in item.continuations], sums - alone)
    right = {name: int(values.argmax()) == item.answer for name, values in zip(NORMALIZATIONS, scores, strict=True)}
    return Scored(right, float(sums[item.answer]), left_out)


def summary(task: Task, scored: Sequence[Scored], normalize: str | None) -> dict[str, Any]:
    """Accuracy with its standard error, the floor, and the mean log-probability of the right answers."""
    chosen = (normalize or "tokens") if task.is_choice else "greedy"
    accuracies = {name: mean([float(item.right[name]) for item in scored]) for name in scored[0].right}
    deviation = standard_deviation([float(item.right[chosen]) for item in scored])
    total = sum(item.log_probability for item in scored) / len(scored)
    result: dict[str, Any] = {"accuracy": accuracies[chosen], "floor_accuracy": floor(task), "log_likelihood": total}
    if deviation is not None:
        result["standard_error"] = deviation / math.sqrt(len(scored))
    if task.is_choice:
        return {**result, "normalize": chosen, **{f"accuracy_{name}": value for name, value in accuracies.items()}}
    return {**result, "perplexity": math.exp(min(-total, 700.0))}  # of a whole target, as LAMBADA's is of a word


def floor(task: Task) -> float:
    """Without learning: the pool's commonest answer always, or where there are choices a random one, if that is better."""
    frequent = commonest(item.continuations[item.answer] for item in task.pool)
    share = mean([float(item.continuations[item.answer] == frequent) for item in task.items])
    chance = mean([1 / len(item.continuations) for item in task.items]) if task.is_choice else 0.0
    return max(share, chance)
