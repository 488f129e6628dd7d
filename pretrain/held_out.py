"""How a run is validated: by its loss on held-out text, or by its task's metrics on held-out examples."""

from __future__ import annotations

from parallel.grid import Grid
from pretrain.config.run import Config
from pretrain.data.sources import Sources
from pretrain.finetuning.examples import ExampleStream
from pretrain.finetuning.instruction import Instruction
from pretrain.finetuning.judging import Judge
from pretrain.finetuning.responses import AnswerJudge
from pretrain.objectives.choice import Objective
from pretrain.objectives.labelled import Labelled
from pretrain.validation import SourcesValidation, Validation


def validation_of(
    config: Config, grid: Grid, sources: Sources, objective: Objective
) -> Validation | SourcesValidation | Judge | None:
    """None where nothing is held out."""
    if isinstance(objective, Labelled):
        assert sources.task is not None
        if sources.examples is None:
            return None
        training = sources.train.examples.items if isinstance(sources.train, ExampleStream) else []
        judge = AnswerJudge if isinstance(sources.task, Instruction) else Judge
        return judge(config, grid, sources.task, objective, sources.examples, training)
    if sources.validation is None:
        return None
    whole = Validation(config, grid, objective, sources.validation)
    parts = {name: Validation(config, grid, objective, stream) for name, stream in sources.held_out.items()}
    return SourcesValidation(parts, None if config.data.validation is None else whole) if parts else whole
