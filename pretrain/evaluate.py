"""How well a trained model predicts a text: loss a token, perplexity, bits per byte; an encoder's loss and accuracy; of pairs
BLEU and exact matches.

Text is scored with a sliding context: windows of the model's length, each advancing by `stride` tokens and scoring only
its last `stride` ones, so that every token but the first ones has at least length - stride tokens before it. An encoder
predicts what its objective hides of it, sequence by sequence. Tasks are scored in `fewshot.py`, labelled examples of a
fine-tuned model by what it predicts.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pretrain import fewshot, translation
from pretrain.data.chunks import Chunks
from pretrain.data.documents import Skipped, read_documents, text_files
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.finetuning.examples import Examples
from pretrain.finetuning.instruction import Instruction
from pretrain.finetuning.judging import Outputs
from pretrain.finetuning.responses import answer_sums
from pretrain.finetuning.tasks import Task
from pretrain.loading import Loaded, load_model
from pretrain.models.gpt import GPT
from pretrain.models.transformer import EncoderDecoder
from pretrain.objectives.choice import labelled_of, objective_of
from pretrain.predict import predictions
from pretrain.tasks.lines import Findings
from pretrain.validation import result_of
from pretrain.vocabulary import vocabulary_of


@torch.inference_mode()
def sum_loss(model: GPT, ids: np.ndarray, stride: int, batch_size: int) -> tuple[float, int]:
    """Summed cross-entropy in nats of ids[1:] and their count. The model must be in `eval()`."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for windows, targets in _batches(ids, model.max_length, stride, batch_size):
        logits = model.logits(torch.from_numpy(windows).to(device))
        wanted = torch.from_numpy(targets).to(device)
        total += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum").item()
        count += int((targets >= 0).sum())
    return total, count


def _batches(ids: np.ndarray, length: int, stride: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(B, length) inputs and targets; a target that an earlier window has scored, or past the end, is -1."""
    inputs, targets, scored = ids[:-1], ids[1:], 0
    starts = range(0, max(1, len(inputs) - length + stride), stride)
    rows = []
    for start in starts:
        window, wanted = inputs[start : start + length], targets[start : start + length].copy()
        wanted[: scored - start] = -1
        scored = start + len(window)
        missing = length - len(window)
        rows.append((np.pad(window, (0, missing)), np.pad(wanted, (0, missing), constant_values=-1)))
        if len(rows) == size or scored >= len(inputs):
            yield np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
            rows = []
        if scored >= len(inputs):
            return


@torch.inference_mode()
def objective_scores(loaded: Loaded, ids: np.ndarray, batch_size: int, has_rows: bool = False) -> dict[str, float]:
    """Loss and accuracy of what the run's own objective hides of the ids, cut into sequences. The last one is filled up with
    document ends, which no objective learns from; an encoder-decoder's leaves it out where there is another. has_rows: the
    ids are rows that were packed."""
    config, model, length = loaded.config, loaded.model, loaded.config.data.seq_length
    whole = len(ids) // length
    rows = whole if isinstance(model, EncoderDecoder) and whole else -(-len(ids) // length)
    tokens = np.full(rows * length + 1, loaded.tokenizer.eos)
    tokens[: len(ids)] = ids[: len(tokens)]
    cut = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
    vocabulary = vocabulary_of(config, loaded.tokenizer)
    objective = objective_of(config, loaded.tokenizer, vocabulary, 1, has_rows)
    device = next(model.parameters()).device
    sums, counts = torch.zeros(objective.num_sums, dtype=torch.float64), torch.zeros(len(objective.terms)).double()
    for first in range(0, rows, batch_size):
        numbers = np.arange(first, min(first + batch_size, rows))
        parts = [numbers] if objective.also is None else [numbers, objective.also(numbers) % rows]
        batch = objective(torch.from_numpy(numbers), torch.from_numpy(np.hstack([cut[part] for part in parts])))
        counts += batch.counts()
        sums += model(*batch.to(device)).double().cpu()
    result = result_of(objective, sums.tolist(), counts.tolist(), None)
    return {"loss": result.loss, **result.scores, "targets": result.targets, "sequences": rows}


def _tokens_of(data: Path, loaded: Loaded, row: int = 0) -> tuple[np.ndarray, int, bool]:
    """The ids of text (a file or a folder, each document with its end) or of shards, the bytes of text behind them, and
    whether they are rows of `row` tokens; what fills other rows is left out. A document end stands before the first, so that
    every token of the data is scored."""
    tokenizer = loaded.tokenizer
    if (data / "manifest.json").is_file():
        manifest = Manifest.load(data)
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(f"--data {data}: these shards were made with another tokenizer than the model's")
        tokens = np.concatenate([[tokenizer.eos], _all_tokens(manifest)])
        has_rows = manifest.packing.is_rows_of_text and manifest.packing.row == row
        if manifest.packing.is_rows_of_text:  # without the look-ahead of the last row
            tokens = tokens[:-1] if has_rows else _unfilled(tokens, tokenizer.eos)
        return _something(data, tokens), manifest.text_bytes, has_rows
    if parts := sorted(data.glob("*/manifest.json")):
        raise UserError(f"--data {data}: name one folder of shards: {', '.join(str(part.parent) for part in parts)}")
    ids, text_bytes, skipped = [tokenizer.eos], 0, Skipped()
    for document in read_documents(text_files([data]), skipped=skipped):
        ids += [*tokenizer.encode(document.text), tokenizer.eos]
        text_bytes += len(document.text.encode())
    _check_all_read(data, skipped)
    return _something(data, np.asarray(ids, dtype=np.int64)), text_bytes, False


def _unfilled(ids: np.ndarray, eos: int) -> np.ndarray:
    """The ids without ends behind an end."""
    ends = ids == eos
    return ids[np.append(True, ~(ends[1:] & ends[:-1]))]


def _something(data: Path, ids: np.ndarray) -> np.ndarray:
    """The ids, of which there must be more than the first document end."""
    if len(ids) < 2:
        raise UserError(f"--data {data}: nothing to score in it")
    return ids


def _check_all_read(data: Path, skipped: Skipped) -> None:
    """A score of a part would look like one of the whole. An empty file has nothing to score."""
    reasons = [f"{reason}: {', '.join(skipped.examples[reason])}" for reason in skipped.counts if reason != "empty"]
    if reasons:
        raise UserError(f"--data {data}: not all of it is text; {'; '.join(reasons)}")


def _all_tokens(manifest: Manifest) -> np.ndarray:
    """Every token of a folder of shards, in order, each chunk's hash checked."""
    chunks, size = Chunks(manifest), manifest.tokens_per_chunk
    counts = [min(size, manifest.tokens - first) for first in range(0, manifest.tokens, size)]
    return np.concatenate([chunks.tokens(chunk, 0, count) for chunk, count in enumerate(counts)]).astype(np.int64)


def main(args: Namespace) -> int:
    """`python -m pretrain evaluate`: prints one JSON line."""
    _check_options(args)
    loaded = load_model(Path(args.run_folder), args.checkpoint)
    if args.task is not None:
        translation.refuse_search(args, "a task is scored by likelihood")
        return _print(fewshot.evaluate(loaded, args))
    return _print(_own(loaded, args) if args.validation else _scores(loaded, args))


def _scores(loaded: Loaded, args: Namespace) -> dict[str, Any]:
    """Of the data that is named."""
    if loaded.task is not None:
        translation.refuse_search(args, f"{args.run_folder} writes no targets")
        return _task(loaded, loaded.task, args)
    if loaded.config.objective.kind == "sequence-to-sequence":
        return _pairs(loaded, args)
    translation.refuse_search(args, f"{args.run_folder} writes no targets")
    if not isinstance(loaded.model, GPT):
        return _hidden(loaded, args)
    length = loaded.model.max_length
    stride = length if args.stride is None else args.stride
    if not 1 <= stride <= length:
        raise UserError(f"--stride {stride}: give 1 to {length}, the model's length")
    ids, text_bytes, _ = _tokens_of(Path(args.data), loaded)
    total, count = sum_loss(loaded.model, ids, stride, args.batch_size)
    loss = total / count
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / max(text_bytes, 1),
        "tokens": count,
        "bytes": text_bytes,
        "stride": stride,
        "step": loaded.step,
    }


def _own(loaded: Loaded, args: Namespace) -> dict[str, Any]:
    """Of the run's own held-out data, each named source by itself. Beside these the whole: of data.validation, or without it of
    all targets together."""
    data = loaded.config.data
    if not data.has_validation:
        raise UserError(f"--validation: {args.run_folder} was trained without held-out data; name some with --data")
    parts = {name: _scores(loaded, _of(args, folder)) for name, folder in data.held_out.items()}
    whole = _together(list(parts.values())) if data.validation is None else _scores(loaded, _of(args, data.validation))
    return {**whole, "step": loaded.step, **({"sources": parts} if parts else {})}


def _of(args: Namespace, data: str) -> Namespace:
    return Namespace(**{**vars(args), "data": data})


def _together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss, and bits per byte where they are known, of several texts as one."""
    unit = "tokens" if "tokens" in parts[0] else "targets"
    count = sum(part[unit] for part in parts)
    found = {"loss": sum(part["loss"] * part[unit] for part in parts) / count, unit: count}
    bits = [part.get("bits_per_byte") for part in parts]
    if all(bits):
        nats = [part["loss"] * part[unit] for part in parts]
        text = sum(one / math.log(2) / each for one, each in zip(nats, bits, strict=True))
        found["bits_per_byte"] = sum(nats) / math.log(2) / text
    return found


def _check_options(args: Namespace) -> None:
    """Raises UserError for an option out of range, or of the other of --data and --task."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: give at least 1")
    if args.task is not None and args.stride is not None:
        raise UserError(f"--stride {args.stride}: has no effect on --task; leave it out")
    given = [f"--{name}" for name in ("shots", "examples", "seed", "normalize") if getattr(args, name) is not None]
    if args.task is None and given:
        raise UserError(f"{', '.join(given)}: no effect on --data; they are options of --task")


def _task(loaded: Loaded, task: Task, args: Namespace) -> dict[str, float]:
    """Metrics on a file of labelled examples, and beside them what is reached without learning."""
    if args.stride is not None:
        raise UserError(f"--stride {args.stride}: has no effect on labelled examples; leave it out")
    path, findings = Path(args.data), Findings(task.config.strict)
    items = list(task.read(task.config, path, True, findings))
    if isinstance(task, Instruction):
        lines = [_answers(loaded, task, items, path, findings, args.batch_size)]
    else:
        lines = list(predictions(loaded, task, iter(items), path, findings, args.batch_size))
    scores = task.metrics(items, lines)
    training = Path(str(loaded.config.data.train))
    if training.is_file():
        known = list(task.read(task.config, training, True, Findings()))
        scores |= {f"floor_{name}": value for name, value in task.floor(known, items).items() if name in scores}
    for text in findings.sentences():
        print(f"note: {text}", file=sys.stderr)
    return {**scores, "examples": len(items), "step": loaded.step}


def _answers(
    loaded: Loaded, task: Instruction, items: list[Any], path: Path, findings: Findings, size: int
) -> dict[str, float]:
    """Sums over the tokens of the answers that the file gives."""
    examples = Examples.read(task, path, items, findings)
    device = next(loaded.model.parameters()).device
    outputs: Outputs = lambda batch: loaded.model(*batch.to(device))  # noqa: E731
    return answer_sums(outputs, labelled_of(loaded.config, task, None), task, examples.samples, size)


def _pairs(loaded: Loaded, args: Namespace) -> dict[str, float]:
    if args.stride is not None:
        raise UserError(f"--stride {args.stride}: has no effect on pairs; leave it out")
    return translation.evaluate(loaded, Path(args.data), translation.search_of(args))


def _hidden(loaded: Loaded, args: Namespace) -> dict[str, float]:
    """What an objective that hides a part of each sequence gets of a text."""
    if args.stride is not None:
        raise UserError(f"--stride {args.stride}: this objective's sequences do not overlap; leave it out")
    ids, text_bytes, has_rows = _tokens_of(Path(args.data), loaded, loaded.config.data.seq_length)
    scores = objective_scores(loaded, ids[1:], args.batch_size, has_rows)
    if loaded.config.objective.kind == "prefix":
        count = len(_unfilled(ids, loaded.tokenizer.eos)) - 1
        scores["bits_per_byte"] = scores["loss"] / math.log(2) * count / max(text_bytes, 1)
    return {**scores, "step": loaded.step}


def _print(result: dict[str, Any]) -> int:
    json.dump(result, sys.stdout)
    print()
    return 0
