"""TensorBoard files of a run: scalars and the charts that stand first (`pretrain.charts`), what happened when, texts by
the model, attention maps, norms and histograms of weights, the config, and hyperparameters."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from parallel.statistics import Histogram
from pretrain.charts import EVENTS, FOLDER, MIXTURE, TRAINING, VALIDATION, layout, source_tags, tag_of
from pretrain.config.load import dump_config
from pretrain.config.run import Config
from pretrain.eventfiles import cut_back

COLUMNS = 8  # of a table of tokens: all side by side, TensorBoard writes each from top to bottom
UNTABLED = str.maketrans({"|": "\u2502", "`": "\u02cb", "\n": "\u21b5", "\r": "\u21b5", "\t": "\u21e5", " ": "\u2423"})


class Board:
    """Writes RUN/tensorboard. `step`: as for `pretrain.metrics.Metrics`, what lies beyond it is removed first."""

    def __init__(self, config: Config, step: int, parameters: int) -> None:
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        folder = Path(config.run.dir) / FOLDER
        left = cut_back(folder, step)
        named = config.data.named is not None
        kinds = (*EVENTS, MIXTURE) if named else EVENTS
        self._happened = {kind: left[f"happened/{kind}/text_summary"] for kind in kinds}  # how often so far
        # A TensorBoard that is looking forgets what it has read of later steps.
        self._writer = SummaryWriter(str(folder), flush_secs=10, purge_step=step + 1 if step else 0)
        self._writer.add_text("settings", _as_code(dump_config(config)))
        scores, norms = config.objective.kind != "causal", config.monitor.norms_every is not None
        self._writer.add_custom_scalars(layout(scores, norms, named))
        settings = {**_hyperparameters(config), "parameters": parameters}
        start, begun, self._ended = hparams(settings, {VALIDATION if config.data.has_validation else TRAINING: 0.0})
        for summary in (start, begun):
            self._writer._get_file_writer().add_summary(summary)

    def scalars(self, step: int, fields: Mapping[str, Any]) -> None:
        """Those of the fields that have a place in a group."""
        for name, value in fields.items():
            if tag := tag_of(name):
                self._writer.add_scalar(tag, value, step)
        for tag, value in source_tags(fields.get("sources", {})).items():
            self._writer.add_scalar(tag, value, step)

    def event(self, kind: str, step: int, words: str) -> None:
        """Something happened, one of EVENTS or MIXTURE: told at its step, and counted from the timeline's next point on."""
        self._happened[kind] += 1
        self._writer.add_text(f"happened/{kind}", _as_code(words), step)

    def timeline(self, step: int) -> None:
        """The timeline's point at this step, one for every point of the loss."""
        for kind, count in self._happened.items():
            self._writer.add_scalar(f"timeline/{kind}", count, step)

    def text(self, step: int, text: str) -> None:
        self._writer.add_text("samples", _as_code(text), step)
        self._writer.flush()

    def attention(self, step: int, images: dict[int, Any], tokens: Sequence[str]) -> None:
        """images: of each layer, (height, width) uint8; tokens: whose numbers are its rows and columns, in their order."""
        for layer, image in images.items():
            self._writer.add_image(f"attention/layer_{layer:02d}", image, step, dataformats="HW")
        self._writer.add_text("tokens/attention", _table(tokens), step)

    def norms(self, step: int, gradients: Mapping[str, float], weights: Mapping[str, float]) -> None:
        """By layer or weight."""
        for group, norms in (("weight_gradient_norm", gradients), ("weight_norm", weights)):
            for name, norm in norms.items():
                self._writer.add_scalar(f"{group}/{name}", norm, step)

    def histograms(self, step: int, gradients: Mapping[str, Histogram], weights: Mapping[str, Histogram]) -> None:
        """By layer or weight."""
        for group, histograms in (("weight_gradient", gradients), ("weight", weights)):
            for name, found in histograms.items():
                if not found.counts:
                    continue
                self._writer.add_histogram_raw(
                    f"{group}/{name}",
                    found.edges[0],
                    found.edges[-1],
                    sum(found.counts),
                    found.sum,
                    found.square_sum,
                    found.edges[1:],
                    found.counts,
                    step,
                )

    def flush(self) -> None:
        """Bring the events to the disk."""
        self._writer.flush()

    def close(self, ended: bool) -> None:
        try:
            if ended:
                self._writer._get_file_writer().add_summary(self._ended)
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread tells whoever writes or flushes next that the disk failed it: told once is enough."""
        ours = type(failed.thread).__module__.startswith("tensorboard")
        if not ours or not isinstance(failed.exc_value, OSError):
            self._hook(failed)


def _table(tokens: Sequence[str]) -> str:
    """Markdown: COLUMNS tokens a row, behind the number of the first."""
    names = [f"`{token.translate(UNTABLED)}`" for token in tokens]
    rows = [["", *(f"+{column}" for column in range(COLUMNS))], ["---"] * (COLUMNS + 1)]
    for first in range(0, len(names), COLUMNS):
        rows.append([str(first), *names[first : first + COLUMNS]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _hyperparameters(config: Config) -> dict[str, Any]:
    """What one compares runs by; not how a step is cut into micro-batches, which changes nothing."""
    found: dict[str, Any] = {}
    for section in ("model", "batch", "optimizer", "schedule"):
        for name, value in getattr(config, section).model_dump(mode="json").items():
            if isinstance(value, str | int | float | bool) and name != "micro_size":
                found[f"{section}.{name}"] = value
    return {**found, "data.seq_length": config.data.seq_length, "run.seed": config.run.seed}
