"""`python -m pretrain predict`: a fine-tuned model's answer to each example of a file, as JSON lines in the file's order.

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

from pretrain.errors import UserError
from pretrain.finetuning.judging import outputs_of, predicted
from pretrain.finetuning.tasks import Task
from pretrain.loading import Loaded, load_model
from pretrain.objectives.batch import TaskBatch
from pretrain.objectives.choice import labelled_of
from pretrain.tasks.lines import Findings
from pretrain.tasks.predictions import PredictionWriter

POOL = 2048  # examples


def load_task(run: Path, step: int | None) -> tuple[Loaded, Task]:
    """A run that was fine-tuned, with its task. Raises UserError where it was not."""
    loaded = load_model(run, step)
    if loaded.task is None:
        raise UserError(
            f"{run}: trained for {loaded.config.objective.kind}, which predicts no labels; fine-tune it first"
        )
    return loaded, loaded.task


def predictions(
    loaded: Loaded, task: Task, items: Iterator[Any], path: Path, findings: Findings, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Of each item, in order."""
    objective = labelled_of(loaded.config, task, None)
    device = next(loaded.model.parameters()).device

    def outputs(batch: TaskBatch) -> Tensor:
        return loaded.model(*batch.to(device))  # type: ignore[no-any-return]

    while pool := list(itertools.islice(items, POOL)):
        samples = [sample for place, item in enumerate(pool) for sample in task.samples(place, item, path, findings)]
        found = outputs_of(outputs, objective, task, samples, batch_size)
        yield from predicted(task, pool, samples, found)


def main(args: Namespace) -> int:
    """`python -m pretrain predict`."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: give at least 1")
    run, path, out = Path(args.run_folder), Path(args.input), Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists; remove it, or name another file")
    loaded, task = load_task(run, args.checkpoint)
    findings = Findings(task.config.strict)
    items = task.read(task.config, path, False, findings)
    depends_on = (
        f"{run.resolve()} step {loaded.step}, {path.resolve()}, {path.stat().st_size if path.is_file() else 0} bytes"
    )
    with PredictionWriter(out, depends_on) as writer, torch.inference_mode():
        rest = writer.remaining(items, lambda item: item.id)
        for count, line in enumerate(predictions(loaded, task, rest, path, findings, args.batch_size), start=1):
            writer.write(line)
            if count % POOL == 0:
                writer.flush()
    for text in findings.sentences():
        print(f"note: {text}", file=sys.stderr)
    print(f"{out}: {writer.num_done:,} predictions", file=sys.stderr)
    return 0
