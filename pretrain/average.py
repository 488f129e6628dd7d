"""`python -m pretrain average`: the mean of a run's last checkpoints, as a run of its own.

It often predicts better than each of them (Vaswani et al. 2017, section 6.1, take the last 5 of the base model's, 20 of the
big one's). The checkpoints to average are kept by `checkpoint.keep_last`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import Checkpoint, list_steps, read_weight, weight_shapes
from pretrain.config.folder import CHECKPOINTS, CONFIG
from pretrain.config.load import dump_config
from pretrain.data.folder import whole_folder
from pretrain.errors import UserError
from pretrain.finetuning.opening import LABELS
from pretrain.huggingface.tensors import Planned
from pretrain.loading import find_checkpoint
from pretrain.runs import keep_tokenizer, run_config, run_tokenizer
from pretrain.tokenization.foreign import FILES
from pretrain.weights import write_weights


def average(run: Path, steps: list[int], out: Path, say: Callable[[str], None] = print) -> None:
    """Write the mean of the weights of these steps' checkpoints to the new run `out`. Raises UserError for one that is
    missing or damaged."""
    config = run_config(run)
    found = [find_checkpoint(run, step) for step in steps]
    planned = [_mean(found, name, shape) for name, shape in weight_shapes(found[-1]).items()]
    with whole_folder(out, (CONFIG, CHECKPOINTS, LABELS, *FILES), say) as draft:
        mine = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(out)})})
        (draft / CONFIG).write_text(dump_config(mine))
        keep_tokenizer(draft, run_tokenizer(run))
        if (run / LABELS).is_file():
            (draft / LABELS).write_bytes((run / LABELS).read_bytes())
        told = ", ".join(map(str, steps))
        write_weights(draft, planned, {"layout": f"mean of the steps {told}", "averaged": str(run)}, "Averaging")


def _mean(found: list[Checkpoint], name: str, shape: tuple[int, ...]) -> Planned:
    def make() -> Tensor:
        total = torch.zeros(shape, dtype=torch.float64)
        for checkpoint in found:
            total += read_weight(checkpoint, name)
        return (total / len(found)).float()

    return Planned(name, shape, make)


def main(args: Namespace) -> int:
    """`python -m pretrain average`."""
    run, out = Path(args.run_folder), Path(args.out)
    run_config(run)  # raises UserError where it is no run's folder
    steps, last = list_steps(run), args.last
    if last < 2:
        raise UserError(f"--last {last}: give at least 2 checkpoints to average")
    if len(steps) < last:
        raise UserError(
            f"--last {last}: {run} has {len(steps)} checkpoints; train with checkpoint.keep_last={last}, or give fewer"
        )
    average(run, steps[-last:], out, lambda line: print(line, file=sys.stderr))
    print(f"{out}: the mean of the steps {', '.join(map(str, steps[-last:]))} of {run}")
    return 0
