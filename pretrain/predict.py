"""`python -m pretrain predict`: a fine-tuned model's answer to each example of a file, or an encoder-decoder's target for each
source, as JSON lines in the file's order.

Examples are read POOL at a time, so the file may be larger than memory; within a pool they are computed in batches of like
lengths. A command that was stopped goes on after the last line that it wrote.
"""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain import translation
from pretrain.errors import UserError
from pretrain.finetuning.instruction import Instruction
from pretrain.finetuning.judging import outputs_of, predicted
from pretrain.finetuning.responses import written
from pretrain.finetuning.tasks import Task
from pretrain.loading import Loaded, load_model
from pretrain.models.gpt import GPT
from pretrain.models.transformer import EncoderDecoder
from pretrain.objectives.choice import labelled_of
from pretrain.objectives.labelled import LabelledBatch
from pretrain.tasks.lines import Findings
from pretrain.tasks.predictions import PredictionWriter

POOL = 2048  # examples
WRITTEN = 128  # the same where the model writes, token by token: what a killed command loses


def pool_of(task: Task) -> int:
    """Examples that are read at a time."""
    return WRITTEN if isinstance(task, Instruction) else POOL


def predictions(
    loaded: Loaded, task: Task, items: Iterator[Any], path: Path, findings: Findings, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Of each item, in order: its label, or what the model writes."""
    objective = labelled_of(loaded.config, task, None)
    device = next(loaded.model.parameters()).device

    def outputs(batch: LabelledBatch) -> Tensor:
        return loaded.model(*batch.to(device))  # type: ignore[no-any-return]

    while pool := list(itertools.islice(items, pool_of(task))):
        samples = [sample for place, item in enumerate(pool) for sample in task.samples(place, item, path, findings)]
        if isinstance(task, Instruction) and isinstance(loaded.model, GPT):
            found = written(loaded.model, task, samples, batch_size)
        else:
            found = outputs_of(outputs, objective, task, samples, batch_size)
        yield from predicted(task, pool, samples, found)


def main(args: Namespace) -> int:
    """`python -m pretrain predict`."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: give at least 1")
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; remove it, or name another file")
    loaded = load_model(Path(args.run_folder), args.checkpoint)
    if loaded.config.objective.kind == "sequence-to-sequence":
        count, findings = _targets(loaded, args), Findings()
    else:
        count, findings = _labels(loaded, args)
    for text in findings.sentences():
        print(f"note: {text}", file=sys.stderr)
    print(f"{out}: {count:,} predictions", file=sys.stderr)
    return 0


def _labels(loaded: Loaded, args: Namespace) -> tuple[int, Findings]:
    """Write a task's predictions; their number, and what was found in the input."""
    path, task = Path(args.input), loaded.task
    told = "answers by the likeliest tokens" if isinstance(task, Instruction) else "predicts no text"
    translation.refuse_search(args, f"{args.run_folder} {told}")
    if task is None:
        raise UserError(
            f"{args.run_folder}: trained for {loaded.config.objective.kind}, which predicts no labels; fine-tune it first"
        )
    findings = Findings(task.config.strict)
    items = task.read(task.config, path, False, findings)
    with PredictionWriter(Path(args.out), _of(loaded, args)) as writer, torch.inference_mode():
        rest = writer.remaining(items, lambda item: item.id)
        for count, line in enumerate(predictions(loaded, task, rest, path, findings, args.batch_size), start=1):
            writer.write(line)
            if count % pool_of(task) == 0:
                writer.flush()
    return writer.num_done, findings


def _targets(loaded: Loaded, args: Namespace) -> int:
    """Write a target for each source; their number."""
    search, model = translation.search_of(args), loaded.model
    assert isinstance(model, EncoderDecoder)
    with PredictionWriter(Path(args.out), f"{_of(loaded, args)}, {search}") as writer:
        rest = writer.remaining(translation.read_source_file(Path(args.input)), lambda pair: pair.id)
        for pair in rest:
            [written] = translation.write_targets(model, loaded.tokenizer, [(pair.source, None)], search)
            writer.write({"id": pair.id, "text": written.text, "score": written.score})
            writer.flush()
    return writer.num_done


def _of(loaded: Loaded, args: Namespace) -> str:
    """What predictions depend on."""
    path = Path(args.input)
    size = path.stat().st_size if path.is_file() else 0
    return f"{Path(args.run_folder).resolve()} step {loaded.step}, {path.resolve()}, {size} bytes"
