"""Answers of a decoder: how well it predicts those that are given, the same under every layout and batch size; and those that
it writes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from parallel.schedules import Schedule
from pretrain.finetuning.instruction import Instruction
from pretrain.finetuning.judging import Judge, Outputs, batch_of, length
from pretrain.finetuning.sequences import Array
from pretrain.finetuning.tasks import Sample, Task
from pretrain.models.gpt import GPT
from pretrain.objectives.labelled import Labelled
from pretrain.validation import Result

Sums = dict[str, float]  # loss in nats, tokens that are the likeliest, tokens


class AnswerJudge(Judge):
    """Validation on held-out conversations. The model gives the sums over each micro-batch, wherever its parts lie."""

    def run(self, schedule: Schedule) -> Result:
        sums, count = torch.zeros(2, dtype=torch.float64, device=self.grid.device), 0.0
        for places in self._groups():
            batches = self._batches(places)
            count += sum(batch.counts().item() for batch in batches)
            sums += schedule.run([batch.to(self.grid.device) for batch in batches], 1.0, forward_only=True).double()
        loss, correct = self.grid.total(sums * self.grid.reads_loss).tolist()
        (tokens,) = self.grid.total_on_host(count * self.grid.reads_data)
        scores = self.task.metrics(self.items, [{"loss": loss, "correct": correct, "tokens": tokens}])
        return Result(scores.pop("loss"), None, int(tokens), scores, None, self.floor)


@torch.inference_mode()
def answer_sums(sums_of: Outputs, objective: Labelled, task: Task, samples: Many[Sample], size: int) -> Sums:
    """Over the answers' tokens of all samples, in batches of like lengths. sums_of: what the model, in `eval()`, gives."""
    ordered = sorted(samples, key=length)
    sums, tokens = torch.zeros(2, dtype=torch.float64), 0.0
    for first in range(0, len(ordered), size):
        batch = batch_of(objective, task, ordered[first : first + size])
        sums += sums_of(batch).double().cpu()
        tokens += batch.counts().item()
    loss, correct = sums.tolist()
    return {"loss": loss, "correct": correct, "tokens": tokens}


def written(model: GPT, task: Instruction, samples: Many[Sample], size: int) -> dict[int, Array]:
    """What the model, in `eval()`, answers to each sample's question, by its place: as the task's `prediction` takes it.

    Questions of one length go together, so that each place of the cache is one place of all of them."""
    by_length: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        by_length.setdefault(length(sample), []).append(place)
    found: dict[int, Array] = {}
    for places in by_length.values():
        for first in range(0, len(places), size):
            part = places[first : first + size]
            prompts = torch.from_numpy(np.stack([samples[place].rows[0].ids for place in part]))
            answers = likeliest(model, prompts, task.config.response_length, task.form.tokenizer.eos)
            found.update(zip(part, answers, strict=True))
    return found


@torch.inference_mode()
def likeliest(model: GPT, prompts: Tensor, most: int, stop: int) -> Iterator[Array]:
    """For each of the prompts (B, S) the likeliest token again and again, until `stop` (which is the last), `most` tokens or
    the model's length: (P, 2) float64, the tokens and the logarithms of their probabilities."""
    count, start = prompts.shape
    most = min(most, model.max_length - start + 1)
    caches = model.make_caches(count, start + most)
    window, seen = prompts.to(next(model.parameters()).device), 0
    going = torch.ones(count, dtype=torch.bool)
    steps: list[tuple[Tensor, Tensor]] = []
    while len(steps) < most and going.any():
        chances = model.logits(window, caches, first=seen)[:, -1].double().log_softmax(dim=-1)
        best, tokens = chances.max(dim=-1)
        steps.append((tokens.cpu(), best.cpu()))
        seen, window = seen + window.shape[1], tokens[:, None]
        going &= steps[-1][0] != stop
    ids, logs = (torch.stack(part, dim=1).double().numpy() for part in zip(*steps, strict=True))
    for row, chance in zip(ids, logs, strict=True):
        ends = np.flatnonzero(row == stop)
        size = int(ends[0]) + 1 if len(ends) else len(row)
        yield np.stack((row[:size], chance[:size]), axis=1)
