"""What runs on a GPU: `make gpu`. `make gpu REHEARSE=1` runs the same on a CPU, its kernels in Triton's interpreter, so that
what is carried to a machine with a GPU has been seen to work up to there. Elsewhere these tests are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.training import write_config


class Place(NamedTuple):
    device: torch.device
    dtypes: tuple[torch.dtype, ...]  # that the kernels take there
    length: int  # of a sequence: small where they are interpreted

    @property
    def rehearsed(self) -> bool:
        return self.device.type == "cpu"


@pytest.fixture(scope="session")
def place() -> Place:
    if torch.cuda.is_available():
        return Place(torch.device("cuda", 0), (torch.bfloat16, torch.float16, torch.float32), 704)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Place(torch.device("cpu"), (torch.float16, torch.float32), 40)
    pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def config(place: Place, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model's config; the grid that tests start with it is left at the end."""
    from parallel.grid import stop_grid

    yield write_config(tmp_path_factory.mktemp("gpu"), tiny_data)
    stop_grid()
