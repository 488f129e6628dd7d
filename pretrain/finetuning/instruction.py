"""The task of a decoder that answers: conversations as sequences whose targets are the answers' tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config.objective import ObjectiveConfig
from pretrain.finetuning.chat import Chat
from pretrain.finetuning.sequences import Array, Format, Sequence
from pretrain.finetuning.tasks import Sample, Task
from pretrain.tasks.alignment import IGNORED
from pretrain.tasks.conversations import read_conversations
from pretrain.tasks.labels import LabelSet
from pretrain.tasks.lines import Findings

FLOOR_ITEMS = 10_000  # conversations whose answers are counted for the floor


class Instruction(Task):
    """What a decoder answers (Ouyang et al. 2022, section 3): the next token, of answers alone.

    As predictions `metrics` takes the sums over the answers' tokens of some of the items: of their losses, of how many are the
    likeliest, and their number. What the model writes of its own is a `prediction`: its outputs are of each token the id
    and the logarithm of its probability."""

    metric = None

    def __init__(self, config: ObjectiveConfig, form: Format, labels: LabelSet) -> None:
        super().__init__(config, form, labels)
        self.chat = Chat(config.template, form.tokenizer, form.length)

    @property
    def num_outputs(self) -> int:
        return 0

    @classmethod
    def read(cls, config: ObjectiveConfig, path: Path, labelled: bool, findings: Findings) -> Iterator[Any]:
        return read_conversations(path, labelled)

    def samples(self, number: int, item: Any, path: Path, findings: Findings) -> list[Sample]:
        """The conversation, each position with the id that follows; of one that asks, the question alone."""
        tokens, asks = self.chat.tokens(item.turns), item.turns[-1].role != "assistant"
        tokens, cut = self.chat.fitted_prompt(tokens, self.config.response_length) if asks else self.chat.fitted(tokens)
        for reason in cut:
            findings.add(path, item.line, reason)
        ids, answered = np.array(tokens.ids, np.int64), np.array(tokens.answered, bool)
        shown, targets = (ids, np.full(1, IGNORED)) if asks else (ids[:-1], np.where(answered, ids, IGNORED)[1:])
        return [Sample(number, (Sequence(shown, np.zeros_like(shown), (0,)),), targets)]

    def prediction(self, item: Any, samples: Many[Sample], outputs: Many[Array]) -> dict[str, Any]:
        """score: the mean logarithm of its tokens' probabilities, its end's among them."""
        ids, chances = outputs[0][:, 0].astype(np.int64), outputs[0][:, 1]
        text = self.form.tokenizer.decode([index for index in ids.tolist() if index != self.form.tokenizer.eos])
        return {"id": item.id, "text": text, "score": float(chances.mean())}

    def metrics(self, items: Many[Any], predictions: Many[dict[str, Any]]) -> dict[str, float]:
        """Of all tokens together, so that a long answer counts as such."""
        loss, correct, tokens = (math.fsum(part[key] for part in predictions) for key in ("loss", "correct", "tokens"))
        mean = loss / max(tokens, 1.0)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "token_accuracy": correct / max(tokens, 1.0)}

    def floor(self, training: Many[Any], items: Many[Any]) -> dict[str, float]:
        """Of each token by how often it stands in training's answers, once more than it does (Laplace)."""
        known, targets = self._answered(training[:FLOOR_ITEMS]), self._answered(items)
        counts = 1 + np.bincount(known, minlength=self.form.tokenizer.vocab_size)
        losses = np.log(counts.sum()) - np.log(counts[targets])
        correct = float((targets == counts.argmax()).sum())
        return self.metrics(items, [{"loss": float(losses.sum()), "correct": correct, "tokens": float(len(targets))}])

    def _answered(self, items: Many[Any]) -> Array:
        """The ids of all answers, as far as they fit."""
        made = [sample for item in items for sample in self.samples(0, item, Path(), Findings())]
        found = [sample.targets[sample.targets != IGNORED] for sample in made]
        return np.concatenate([np.empty(0, np.int64), *found])
