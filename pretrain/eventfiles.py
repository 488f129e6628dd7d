"""TensorBoard's event files of a run that is set back: each step once, whatever was written beyond it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATTERN = "events.out.tfevents.*"
BEGINNINGS = ("_hparams_", "settings", "custom_scalars__config__")  # what every session writes when it begins


def cut_back(folder: Path, step: int) -> Counter[str]:
    """Leave what is of steps up to `step` in one file, in place of all that are there; at step 0, nothing. What a run
    writes as it begins goes too: it will write that again. Returns how many of each tag are left."""
    left: Counter[str] = Counter()
    files = sorted(folder.glob(PATTERN))
    if not files:
        return left
    partial = folder / ".partial"
    if step:
        left = _copy(files, partial, step)
        os.replace(partial, files.pop(0))
    for file in files:
        file.unlink()
    return left


def _copy(files: list[Path], target: Path, step: int) -> Counter[str]:
    from tensorboard.summary.writer.record_writer import RecordWriter

    left: Counter[str] = Counter()
    with open(target, "wb") as out:
        writer = RecordWriter(out)
        for event in _kept(files, step):
            writer.write(event.SerializeToString())
            left.update(value.tag for value in event.summary.value)
        writer.flush()
    return left


def _kept(files: list[Path], step: int) -> Iterator[Any]:
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
                yield event


def _begins(tag: str) -> bool:
    return tag.startswith(BEGINNINGS)
