"""TensorBoard files of a run: scalars in six groups, text by the model, attention maps, the config, and hyperparameters.

train/       loss, grad_norm, learning_rate, batch_size, of several phases seq_length; each term of the loss where there
             are several
speed/       tokens_per_second (of labelled examples examples_per_second), step_seconds, mfu and hfu where the device's peak
             is known
memory/      gibibytes
data/        wait_seconds a step, epochs
checkpoint/  stall_seconds, write_seconds
validation/  loss, bits_per_byte; accuracies, a task's metrics
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pretrain.config.load import dump_config
from pretrain.config.run import Config

METRIC = "validation/loss"
UNTABLED = str.maketrans({"|": "\u2502", "`": "\u02cb", "\n": "\u21b5", "\r": "\u21b5", "\t": "\u21e5", " ": "\u2423"})
GROUPS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "batch_size": "train/batch_size",
    "seq_length": "train/seq_length",
    "tokens_per_second": "speed/tokens_per_second",
    "examples_per_second": "speed/examples_per_second",
    "step_seconds": "speed/step_seconds",
    "mfu": "speed/mfu",
    "hfu": "speed/hfu",
    "data_seconds": "data/wait_seconds",
    "epochs": "data/epochs",
    "checkpoint_stall_seconds": "checkpoint/stall_seconds",
    "checkpoint_write_seconds": "checkpoint/write_seconds",
    "validation_loss": METRIC,
    "bits_per_byte": "validation/bits_per_byte",
}


def tag_of(name: str) -> str | None:
    """A field's place in a group; what else is measured of a model stands beside its loss."""
    if name in GROUPS:
        return GROUPS[name]
    if name.startswith("validation_") and name != "validation_targets":
        return f"validation/{name.removeprefix('validation_')}"
    return f"train/{name}" if name.endswith("_loss") else None


class Board:
    """Writes RUN/tensorboard. `step`: as for `pretrain.metrics.Metrics`, what lies beyond it is removed first."""

    def __init__(self, config: Config, step: int, parameters: int) -> None:
        self._hook, threading.excepthook = threading.excepthook, self._thread_failed
        folder = Path(config.run.dir) / "tensorboard"
        cut_back(folder, step)
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        self._writer.add_text("config", _as_code(dump_config(config)))
        settings = {**_hyperparameters(config), "parameters": parameters}
        start, begun, self._ended = hparams(settings, {METRIC: 0.0} if config.data.validation else {"train/loss": 0.0})
        for summary in (start, begun):
            self._writer._get_file_writer().add_summary(summary)

    def scalars(self, step: int, fields: dict[str, Any]) -> None:
        """Those of the fields that have a place in a group."""
        for name, value in fields.items():
            if tag := tag_of(name):
                self._writer.add_scalar(tag, value, step)
        if "memory_bytes" in fields:
            self._writer.add_scalar("memory/gibibytes", fields["memory_bytes"] / 2**30, step)

    def text(self, step: int, text: str) -> None:
        self._writer.add_text("samples", _as_code(text), step)
        self._writer.flush()

    def attention(self, step: int, images: dict[int, Any], tokens: Sequence[str]) -> None:
        """images: of each layer, (height, width) uint8; tokens: whose numbers are its rows and columns, in their order."""
        for layer, image in images.items():
            self._writer.add_image(f"attention/layer_{layer:02d}", image, step, dataformats="HW")
        numbers = " | ".join(str(number) for number in range(len(tokens)))
        names = " | ".join(f"`{token.translate(UNTABLED)}`" for token in tokens)
        rule = " | ".join("---" for _ in tokens)
        self._writer.add_text("attention/tokens", f"| {numbers} |\n| {rule} |\n| {names} |", step)

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


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _hyperparameters(config: Config) -> dict[str, Any]:
    """What one compares runs by."""
    found: dict[str, Any] = {}
    for section in ("model", "batch", "optimizer", "schedule"):
        for name, value in getattr(config, section).model_dump(mode="json").items():
            if isinstance(value, str | int | float | bool):
                found[f"{section}.{name}"] = value
    return {**found, "data.seq_length": config.data.seq_length, "run.seed": config.run.seed}


# -- setting back ----------------------------------------------------------------------------------------------------


def cut_back(folder: Path, step: int) -> None:
    """Leave the scalars and texts up to `step` in one file, in place of all that are there; at step 0, nothing. The
    config and hyperparameters go too: a run that begins writes them again."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return
    partial = folder / ".partial"
    if step:
        _copy(files, partial, step)
        os.replace(partial, files.pop(0))
    for file in files:
        file.unlink()


def _copy(files: list[Path], target: Path, step: int) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(target, "wb") as out:
        writer = RecordWriter(out)
        for record in _kept(files, step):
            writer.write(record)
        writer.flush()


def _kept(files: list[Path], step: int) -> Iterator[bytes]:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    versions = 0
    for file in files:
        for record in RawEventFileLoader(str(file)).Load():  # ends at a record that is not whole
            event = Event.FromString(record)
            tags = [value.tag for value in event.summary.value]
            version = event.HasField("file_version")
            versions += version
            if (version and versions == 1) or (tags and event.step <= step and not any(map(_begins, tags))):
                yield record


def _begins(tag: str) -> bool:
    return tag.startswith(("_hparams_", "config"))
