"""TensorBoard's event files of a run that is set back: each step once, whatever was written beyond it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PATTERN = "events.out.tfevents.*"
BEGINNINGS = ("_hparams_", "config", "custom_scalars__config__")  # what every session writes when it begins


def cut_back(folder: Path, step: int) -> None:
    """Leave what is of steps up to `step` in one file, in place of all that are there; at step 0, nothing. What a run
    writes as it begins goes too: it will write that again."""
    files = sorted(folder.glob(PATTERN))
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
    return tag.startswith(BEGINNINGS)
