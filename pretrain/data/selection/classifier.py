"""What one of our own fine-tuned classification runs says of texts, by the code of `python -m pretrain predict`.

The model is loaded when it is first asked, so that each worker process has its own and the process that starts them has none.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.data.selection.config import Quality
from pretrain.data.selection.rules import SHARES, Array, Rule
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.loading import Loaded

CHARACTERS_PER_TOKEN = 32  # of a text's beginning at most: what is behind does not reach the model


class Classifier:
    """Raises UserError where the run is no classifier of one text, or does not know the label."""

    def __init__(self, config: Quality) -> None:
        self.config = config
        self.rule = Rule(f"probability of {config.label}", least=config.least, scale=SHARES)
        self.fingerprint = _checked(config)

    def __call__(self, texts: Sequence[str]) -> Array:
        """(D,) probability of the label; rounded, so that it hardly depends on which texts are computed together."""
        return np.array([round(chance, 4) for chance in self._chances(texts)])

    def _chances(self, texts: Sequence[str]) -> list[float]:
        from pretrain.finetuning.judging import outputs_of, predicted
        from pretrain.objectives.choice import labelled_of
        from pretrain.objectives.labelled import LabelledBatch
        from pretrain.tasks.labelled import Classified
        from pretrain.tasks.lines import Findings

        loaded, path = self._loaded, Path(self.config.run)
        task, device = loaded.task, next(loaded.model.parameters()).device
        assert task is not None
        limit = CHARACTERS_PER_TOKEN * loaded.config.data.seq_length
        items = [Classified(place, place + 1, (text[:limit],), None) for place, text in enumerate(texts)]
        findings = Findings(False)
        samples = [sample for item in items for sample in task.samples(item.id, item, path, findings)]

        def outputs(batch: LabelledBatch):  # type: ignore[no-untyped-def]
            return loaded.model(*batch.to(device))

        objective = labelled_of(loaded.config, task, None)
        found = outputs_of(outputs, objective, task, samples, self.config.batch_size)
        return [line["scores"][self.config.label] for line in predicted(task, items, samples, found)]

    @functools.cached_property
    def _loaded(self) -> Loaded:
        import torch

        from pretrain.loading import load_model

        torch.set_num_threads(1)  # processes are the parallelism of prepare
        return load_model(Path(self.config.run))


def _checked(config: Quality) -> str:
    """Hash of the run's newest checkpoint, whose weights decide."""
    from pretrain.finetuning.opening import run_labels
    from pretrain.loading import find_checkpoint
    from pretrain.opening import MANIFEST
    from pretrain.runs import run_config

    run = Path(config.run)
    if not run.is_dir():
        raise UserError(f"quality.run: there is no folder {run}; name a run fine-tuned for classification.")
    settings = run_config(run)
    if settings.objective.kind != "classification":
        raise UserError(f"quality.run: {run} was trained for {settings.objective.kind}, not classification.")
    if settings.objective.texts is not None and len(settings.objective.texts) != 1:
        raise UserError(f"quality.run: {run} classifies pairs of texts, and a document is one.")
    labels = run_labels(run).names
    if config.label not in labels:
        raise UserError(f"quality.label: {run} has no label {config.label!r}; its labels are {', '.join(labels)}.")
    return hashlib.sha256((find_checkpoint(run, None).folder / MANIFEST).read_bytes()).hexdigest()
