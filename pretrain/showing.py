"""What a run shows of its model at work beside the loss: texts, what heads look at, targets for held-out pairs, norms and
histograms of weights.

All but the last need a process that can run all layers on one token after the other; where there is none, they are not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from parallel.grid import Grid
from pretrain.attention import Image, as_image, attention_maps, chosen_sample, shown_layers
from pretrain.build import Built
from pretrain.config.duration import Span
from pretrain.config.run import Config
from pretrain.data.sources import Sources
from pretrain.finetuning.instruction import Instruction
from pretrain.gauges import Gauges
from pretrain.generate import Sampling, sample_text
from pretrain.heartbeat import Heartbeat
from pretrain.models.gpt import GPT
from pretrain.models.stack import Stack
from pretrain.models.transformer import EncoderDecoder
from pretrain.objectives.choice import Objective
from pretrain.report import Silent
from pretrain.translation import Translations
from pretrain.validation import Result

WISHES = ("sample_every", "translate_pairs", "attention_every")  # fields of `monitor`
SAMPLING = Sampling(0.8, 50)


class Maps(NamedTuple):
    """Images of attention by layer, and the tokens of the sample that they are of."""

    images: dict[int, Image]
    tokens: list[str]


class Showing:
    """Of the model that is in training. Collective."""

    def __init__(self, config: Config, grid: Grid, sources: Sources, objective: Objective, built: Built) -> None:
        self.config, self.grid, self.sources, self.objective = config, grid, sources, objective
        self.built, self.gauges = built, Gauges(config.monitor, built.engine, grid)
        count, stream = config.monitor.translate_pairs, sources.validation
        self.translations: Translations | None = None
        if count is not None and stream is not None:
            self.translations = Translations(stream, config.objective.lengths(config.data.seq_length)[0], count)

    @property
    def is_possible(self) -> bool:
        layout = self.grid.layout
        return layout.pipeline == 1 and layout.context == 1 and layout.zero < 3 and not layout.sequence

    def unmet(self) -> Iterator[str]:
        """For people: what was wished and cannot be."""
        for name in () if self.is_possible else WISHES:
            if getattr(self.config.monitor, name) is not None:
                yield f"monitor.{name} has no effect under {self.grid.layout}: no process can run all layers"

    def show(self, step: int, due: Callable[[Span | None], bool], reporter: Silent, heartbeat: Heartbeat) -> None:
        """All that is due after this step."""
        monitor = self.config.monitor
        if self.is_possible and due(monitor.sample_every):
            heartbeat.mark(step, "sample")
            reporter.text(step, self.text())
        if self.is_possible and due(monitor.attention_every):
            heartbeat.mark(step, "attention maps")
            reporter.attention(step, *self.maps())
        if due(monitor.norms_every):
            heartbeat.mark(step, "norms")
            reporter.norms(step, self.gauges.norms())
        if due(monitor.histograms_every):
            heartbeat.mark(step, "histograms")
            reporter.histograms(step, self.gauges.histograms())

    def text(self) -> str:
        """What the model writes behind `monitor.sample_prompt`."""
        self.built.train(False)
        model, monitor, task = self.built.stages[0].module, self.config.monitor, self.sources.task
        assert isinstance(model, GPT)
        prompt = task.chat.asked(monitor.sample_prompt) if isinstance(task, Instruction) else monitor.sample_prompt
        return sample_text(model, self.sources.tokenizer, prompt, monitor.sample_tokens, SAMPLING)

    def maps(self) -> Maps:
        """What each head looks at in the chosen sample."""
        self.built.train(False)
        model = self.built.stages[0].module
        assert isinstance(model, Stack)
        sample = chosen_sample(self.config, self.sources, self.objective)
        found = attention_maps(model, sample, shown_layers(self.config))
        return Maps({layer: as_image(heads) for layer, heads in found.items()}, sample.tokens)

    def translated(self, result: Result) -> Result:
        """The result of a validation, with scores of what the model, in `eval()`, writes for held-out pairs where that is
        wished."""
        if self.translations is None or not self.is_possible:
            return result
        model = self.built.stages[0].module
        assert isinstance(model, EncoderDecoder)
        return self.translations.judge(model, self.sources.tokenizer, result)
