"""The whole configuration of a run: one YAML file, a section a class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from parallel.layout import ParallelConfig, Problem
from pretrain.config.data import DataConfig
from pretrain.config.kernels import KernelsConfig
from pretrain.config.model import ModelConfig
from pretrain.config.monitoring import MonitorConfig
from pretrain.config.objective import PRETRAINING, ObjectiveConfig
from pretrain.config.section import Section, meaning
from pretrain.config.training import (
    BatchConfig,
    CheckpointConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)

LEAST_MASKED = 8  # tokens of a sequence


def an(kind: str) -> str:
    """The kind of model with its article, for messages."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


class Config(Section):
    """A run."""

    version: Literal[1] = meaning(1, "of this file's format")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    run: RunConfig = Field(default_factory=RunConfig)

    @property
    def data_seed(self) -> int:
        """Of the data's order."""
        return self.run.seed if self.data.seed is None else self.data.seed

    @property
    def phases(self) -> list[Config]:
        """The run's phases in order, each as the config of a run that has no other; the last is of data.seq_length."""
        if not self.data.phases:
            return [self]
        longest = max(self.data.seq_length, self.model.max_positions or 0)
        model = self.model.model_copy(update={"max_positions": longest})  # the tables are as long in every phase
        return [
            *(self._phase(model, part.seq_length, part.batch_size, part.micro_size) for part in self.data.phases),
            self._phase(model, self.data.seq_length, None, None),
        ]

    def _phase(self, model: ModelConfig, length: int, size: int | None, micro_size: int | None) -> Config:
        data = self.data.model_copy(update={"seq_length": length, "phases": []})
        sizes = {"size": size or self.batch.size, "micro_size": micro_size or self.batch.micro_size}
        return self.model_copy(update={"model": model, "data": data, "batch": self.batch.model_copy(update=sizes)})

    @property
    def lengths(self) -> list[tuple[str, int]]:
        """The sequences that a sample is to the model, each with its name and its tokens."""
        length = self.data.seq_length
        if self.model.kind != "encoder-decoder" or self.objective.is_task:
            return [("data.seq_length", length)]
        source, target = self.objective.lengths(length)
        return [("the source's length", source), ("the target's length", target)]

    def _kind_problems(self) -> Iterator[Problem]:
        model, objective = self.model.kind, self.objective.kind
        unknown = self.model.initial is not None and "kind" not in self.model.model_fields_set
        if not unknown and PRETRAINING.get(objective, model) != model:
            fitting = next(kind for kind, trained in PRETRAINING.items() if trained == model)
            mend = f"set model.kind: {PRETRAINING[objective]}, or objective.kind: {fitting}"
            yield Problem("objective.kind", f"{objective} does not train {an(model)}", mend)
        if objective == "instruction" and model == "bert" and not unknown:
            mend = "start from a decoder (model.kind: gpt): an encoder writes no text"
            yield Problem("objective.kind", f"{objective} does not train {an(model)}", mend)
        if self.monitor.sample_every is not None and objective not in ("causal", "instruction"):
            yield Problem("monitor.sample_every", f"a model of {objective} writes no text", "remove it")
        if self.monitor.translate_pairs is not None and objective != "sequence-to-sequence":
            mend = "remove it, or set objective.kind: sequence-to-sequence"
            yield Problem("monitor.translate_pairs", f"has no effect with objective.kind: {objective}", mend)
        if self.objective.is_task:
            yield from self._task_problems()
        if model == "encoder-decoder" and self.objective.is_task:
            yield Problem("objective.kind", f"{objective} has its head on one stack", "take a gpt or a bert")
        elif model == "encoder-decoder":
            yield from self._length_problems()
        lengths = {f"data.phases.{n}.seq_length": phase.seq_length for n, phase in enumerate(self.data.phases)}
        for path, length in {**lengths, "data.seq_length": self.data.seq_length}.items():
            if objective == "masked" and length < LEAST_MASKED:
                yield Problem(path, f"{length} leaves no room beside [CLS] and [SEP]", f"give at least {LEAST_MASKED}")
        if self.data.phases:
            yield from self._phase_problems()

    def _phase_problems(self) -> Iterator[Problem]:
        if self.objective.is_task:
            yield Problem("data.phases", "has no effect on labelled examples", "remove it")
        elif self.model.kind == "encoder-decoder":
            found = "an encoder-decoder's source and target have one length each for the whole run"
            yield Problem("data.phases", found, "remove it")
        sized = [n for n, phase in enumerate(self.data.phases) if phase.batch_size is not None]
        if sized and self.batch.ramp is not None:
            found = "batch.ramp decides how many sequences a step has"
            yield Problem(f"data.phases.{sized[0]}.batch_size", found, "remove it, or batch.ramp")

    def _length_problems(self) -> Iterator[Problem]:
        length, objective = self.data.seq_length, self.objective
        if objective.source_length is not None and objective.source_length >= length:
            found = f"{objective.source_length} leaves nothing of data.seq_length {length} to the target"
            yield Problem("objective.source_length", found, "lower it, or raise data.seq_length")
        elif length < 2:
            yield Problem("data.seq_length", f"{length} is too short for a source and a target", "give at least 2")
        if objective.kind == "span-corruption" and (spans := objective.spans(length)[1]) > objective.sentinels:
            found = f"{objective.sentinels} are fewer than the {spans} spans of a sequence"
            yield Problem("objective.sentinels", found, f"give at least {spans}")

    def _task_problems(self) -> Iterator[Problem]:
        if self.model.initial is None:
            yield Problem("model.initial", "is missing", "name a run, or a folder of Hugging Face's, to start from")
        for name in ("train", "validation"):
            if not isinstance(getattr(self.data, name), str | None):
                yield Problem(f"data.{name}", "is more than one", "name one file of labelled examples")
        windowed = self.objective.kind in ("tagging", "question-answering")
        if windowed and self.objective.overlap >= self.data.seq_length:
            found = f"{self.objective.overlap} is not below data.seq_length {self.data.seq_length}"
            yield Problem("objective.overlap", found, "lower it")
        sections = {"schedule.total": self.schedule.total, "schedule.warmup": self.schedule.warmup}
        for path, span in sections.items():
            if span.unit == "tokens":
                yield Problem(path, "examples differ in length, so tokens are not known ahead", "give steps or epochs")
        if self.batch.ramp is not None:
            yield Problem("batch.ramp", "has no effect on labelled examples", "remove it")

    def _attention_problems(self) -> Iterator[Problem]:
        monitor, layers, count = self.monitor, self.monitor.attention_layers, self.model.num_layers
        unknown = self.model.initial is not None and "num_layers" not in self.model.model_fields_set
        if layers is not None and not unknown and not (layers and all(0 <= layer < count for layer in layers)):
            found = f"{layers} is no list of layers 0 to {count - 1}"
            yield Problem("monitor.attention_layers", found, "name some of these, or null")
        if monitor.attention_every is None:
            return
        if self.model.kind not in ("gpt", "bert"):
            yield Problem("monitor.attention_every", f"draws no {self.model.kind}, but gpt and bert", "remove it")
        if not monitor.sample_prompt and not self.data.has_validation:
            yield Problem("monitor.attention_every", "needs a sample", "set monitor.sample_prompt, or data.validation")

    def problems(self) -> Iterator[Problem]:
        yield from self._kind_problems()
        if self.kernels.rotary == "triton" and self.model.positions != "rope":
            message = f"has no effect with model.positions: {self.model.positions}"
            yield Problem("kernels.rotary", message, "remove it, or set model.positions: rope")
        monitor, limit = self.monitor, self.model.max_positions
        longest = max(length for _, length in self.lengths)
        if limit is not None and limit < longest:
            message = f"{longest} is longer than model.max_positions {limit}"
            yield Problem("data.seq_length", message, "lower it, or raise model.max_positions")
        for name in ("validate_every", "patience", "translate_pairs"):
            if not self.data.has_validation and getattr(monitor, name) is not None:
                yield Problem(f"monitor.{name}", "needs held-out data", "set data.validation, or remove it")
        yield from self._attention_problems()
        if monitor.patience is not None and monitor.validate_every is None:
            yield Problem("monitor.patience", "counts validations", "set monitor.validate_every")
