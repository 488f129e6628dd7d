"""`python -m pretrain predict RUN --features LAYERS`: hidden states of a model that stays as it is, as the input of another
(Devlin et al. 2018, section 5.3).

Layer 0 is what the blocks are given, layer i what the i-th of them gives; the last one after the final norm. A line of the
output is {"id": ..., "features": [...]}: for each layer that is asked for a vector of the whole text, or one for each token.
Pre-trained and fine-tuned runs alike: heads are left aside.
"""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kernels.vector_math import settle
from parallel.grid import pick_device
from parallel.layers import Parts
from pretrain import checkpoint
from pretrain.build import DTYPES
from pretrain.config.objective import ObjectiveConfig
from pretrain.config.run import Config
from pretrain.errors import UserError
from pretrain.finetuning.judging import outputs_of
from pretrain.finetuning.opening import task_of
from pretrain.finetuning.tasks import Sample, Task
from pretrain.initial import HEADS
from pretrain.loading import find_checkpoint
from pretrain.models.stack import Stack
from pretrain.objectives.batch import TaskBatch
from pretrain.objectives.labelled import Labelled, LabelledBatch
from pretrain.runs import run_config, run_tokenizer
from pretrain.tasks.alignment import owners
from pretrain.tasks.labels import LabelSet
from pretrain.tasks.lines import Findings
from pretrain.tasks.predictions import PredictionWriter
from pretrain.vocabulary import vocabulary_of

POOL = 256  # examples that are computed together, in batches of like lengths: all their vectors are in memory
Pooling = Literal["mean", "first", "tokens"]
Array = np.ndarray[Any, Any]


@torch.inference_mode()
def every_state(body: Stack, batch: TaskBatch) -> list[Tensor]:
    """(N, S, H) of each layer from 0 on."""
    x = body.begin(body.embedding(batch.inputs), None, batch.documents, batch.segments)
    context, states = body.context(batch.inputs.shape[1], None, batch.documents), []
    for _, block in body.layers():
        states.append(x)
        x = block(x, context)
    return [*states, body.final(x)]


class Extractor:
    """The body of a run's model, and how its texts become sequences: `tagged` ones word by word."""

    def __init__(self, run: Path, step: int | None, tagged: bool) -> None:
        settle()
        config, tokenizer, found = run_config(run), run_tokenizer(run), find_checkpoint(run, step)
        if config.model.kind == "encoder-decoder":
            raise UserError(
                f"--features: {run} is an encoder-decoder; hidden states are of encoders and decoders alone"
            )
        words = vocabulary_of(config, tokenizer)
        self.step, self.num_layers = found.state.step, config.model.num_layers
        self.body = Stack(config.model, Parts(), words.size, config.data.seq_length)
        checkpoint.load_weights(found, self.body, beside=HEADS)
        self.body.to(pick_device(), DTYPES[config.precision.compute]).eval()
        tagged = tagged or config.objective.kind == "tagging"
        self.task = task_of(_reading(config, "tagging" if tagged else "classification"), tokenizer, words, LabelSet(()))
        self.objective = Labelled(self.task.config.kind, config.run.seed, 1, None, at_end=config.model.causal)

    def vectors(self, batch: LabelledBatch, layers: Many[int], pooling: Pooling) -> Tensor:
        """(N, layers, H), or of tokens (N, S, layers, H)."""
        assert isinstance(batch, TaskBatch), "texts are read as for a label or tags"
        batch = batch.to(next(self.body.parameters()).device)
        every = every_state(self.body, batch)
        states = torch.stack([every[layer] for layer in layers], dim=2).float()
        if pooling == "tokens":
            return states
        if pooling == "first":
            return states[torch.arange(len(states), device=states.device), batch.places[:, 0]]
        held = (batch.documents == 0)[..., None, None]  # no padding
        return (states * held).sum(dim=1) / held.sum(dim=1)


def chosen_layers(text: str, num_layers: int) -> list[int]:
    """`-1`, `0,6,12` or `-4:`, of the layers 0 to num_layers. Raises UserError."""
    every, chosen = list(range(num_layers + 1)), []
    for part in text.split(","):
        ends = part.strip().split(":")
        try:
            numbers = [int(end) if end.strip() else None for end in ends]
            found = every[slice(*numbers)] if len(numbers) == 2 else [every[int(*ends)]]
        except (ValueError, TypeError, IndexError):
            found = []
        if not found:
            raise UserError(
                f"--features {text}: {part.strip()!r} names no layer; there are 0 (the embeddings) to {num_layers}, "
                "-1 is the last, -4: the last four"
            )
        chosen += found
    return chosen


def _reading(config: Config, kind: Literal["classification", "tagging"]) -> Config:
    """The config with the objective by which texts are read."""
    if config.objective.kind == kind:
        return config
    overlap = {"overlap": min(ObjectiveConfig().overlap, config.data.seq_length // 2)} if kind == "tagging" else {}
    return config.model_copy(update={"objective": ObjectiveConfig.model_validate({"kind": kind, **overlap})})


def of_item(task: Task, samples: Many[Sample], found: Many[Array], pooling: Pooling) -> Array:
    """(layers, H), or of tokens (layers, T, H): of tagged ones their first word pieces', zeros where one has none, of a
    text all of its sequence's. found: as `Extractor.vectors` gives for each sample."""
    if pooling != "tokens":
        return found[0] if len(found) == 1 else np.mean(np.stack(found), axis=0)
    if task.config.kind != "tagging":
        return found[0][: len(samples[0].rows[0].ids)].swapaxes(0, 1)
    first, count, _ = samples[0].about
    windows = [sample.about[2] for sample in samples]
    owner = owners(windows, count)
    whole = np.zeros((count + 1, *found[0].shape[1:]), np.float32)  # the last for tokens without word pieces
    for number, (sample, values) in enumerate(zip(samples, found, strict=True)):
        (start, end), begin = windows[number], sample.rows[0].begins[0]
        mine = owner[start:end] == number
        whole[start:end][mine] = values[begin : begin + end - start][mine]
    return whole[first].swapaxes(0, 1)


def features(
    extractor: Extractor,
    items: Iterator[Any],
    path: Path,
    findings: Findings,
    layers: Many[int],
    pooling: Pooling,
    size: int,
) -> Iterator[dict[str, Any]]:
    """A line of each item, in order; size: sequences at once."""
    task = extractor.task
    while pool := list(itertools.islice(items, POOL)):
        samples = [task.samples(place, item, path, findings) for place, item in enumerate(pool)]
        flat = [sample for made in samples for sample in made]
        found = outputs_of(
            lambda batch: extractor.vectors(batch, layers, pooling), extractor.objective, task, flat, size
        )
        places = iter(range(len(flat)))
        for item, made in zip(pool, samples, strict=True):
            values = of_item(task, made, [found[next(places)] for _ in made], pooling)
            yield {"id": item.id, "features": values.tolist()}


def main(args: Namespace) -> int:
    """`python -m pretrain predict --features LAYERS`."""
    run, path, out = Path(args.run_folder), Path(args.input), Path(args.out)
    tagged = path.suffix == ".conll"
    extractor = Extractor(run, args.checkpoint, tagged)
    pooling: Pooling = args.pool or "mean"
    layers = chosen_layers(args.features, extractor.num_layers)
    task, findings = extractor.task, Findings(False)
    items = task.read(task.config, path, False, findings)
    size = path.stat().st_size if path.is_file() else 0
    depends_on = f"{run.resolve()} step {extractor.step}, {path.resolve()}, {size} bytes, layers {layers}, {pooling}"
    with PredictionWriter(out, depends_on) as writer:
        rest = writer.remaining(items, lambda item: item.id)
        lines = features(extractor, rest, path, findings, layers, pooling, args.batch_size)
        for count, line in enumerate(lines, start=1):
            writer.write(line)
            if count % POOL == 0:
                writer.flush()
    for text in findings.sentences():
        print(f"note: {text}", file=sys.stderr)
    shape = "a vector for each token" if pooling == "tokens" else "a vector"
    told = f"layers {', '.join(map(str, layers))}, {shape} of {extractor.body.config.hidden_size}"
    print(f"{out}: {writer.num_done:,} examples, {told}", file=sys.stderr)
    return 0
