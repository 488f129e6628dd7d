"""What tells a slow or a broken GPU from a good one."""

from __future__ import annotations

import pytest
import torch

from pretrain import resources
from pretrain.stragglers import DeviceClock
from tests.gpu.conftest import Place

CYCLES = 200_000_000  # about a tenth of a second


def test_a_device_that_computes_right_is_not_suspected(place: Place) -> None:
    assert resources.computes_right(place.device)


def test_what_a_stream_waits_for_others_is_not_a_ranks_own(place: Place) -> None:
    """One sleep stands for its passes, three for exchanges."""
    if place.rehearsed:
        pytest.skip("needs a GPU")
    clock = DeviceClock()
    torch.cuda._sleep(CYCLES)
    own = clock.seconds()
    for _ in range(3):
        with clock.around("group"):
            torch.cuda._sleep(CYCLES)
    assert clock.seconds() == pytest.approx(own, rel=0.2) and own > 0.02


def test_the_drivers_count_of_errors_is_read(place: Place) -> None:
    if place.rehearsed:
        pytest.skip("needs a GPU")
    assert resources.broken_devices() == [] and resources.free_on_device(place.device) > 2**20
