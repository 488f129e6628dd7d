"""A checkpoint of weights alone, with which a run can be used and started from, but not gone on: it has no optimizer's state.

What `import` and `average` leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pretrain.huggingface.progress import Bar
from pretrain.huggingface.tensors import Planned, parts_of, write_file
from pretrain.opening import State, folder_of, open_checkpoint
from pretrain.saving import write_manifest
from pretrain.storage import Entry, Written, file_name


def write_weights(run: Path, planned: Sequence[Planned], about: dict[str, Any], title: str) -> None:
    """The checkpoint of step 0. about: what it tells of its making; title: of the bar."""
    folder = folder_of(run, 0)
    folder.mkdir(parents=True)
    written = Written([], {})
    with Bar(title, sum(tensor.numel for tensor in planned) * torch.float32.itemsize) as bar:
        for number, part in enumerate(parts_of(planned, torch.float32.itemsize)):
            name = file_name(0, number)
            written.files[name] = write_file(folder / name, part, torch.float32, bar.add, {"format": "pt"})
            for tensor in part:
                whole = Entry(tensor.name, tensor.shape, (0,) * len(tensor.shape), tensor.shape, name)
                written.entries.append(whole)
    write_manifest(folder, State(), {"processes": 1, **about}, [written])
    open_checkpoint(folder)  # what was written is what will be accepted
