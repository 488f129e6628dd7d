"""A loss that jumps: its step is left out, or the run goes back and passes over the data, and stays exact in both."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import spikes
from pretrain.data.stream import Stream, batch_hash
from pretrain.errors import UserError
from pretrain.opening import open_checkpoint
from pretrain.spikes import Level, passing, past
from tests.distributed import run_ranks
from tests.pretrain import formats, running
from tests.pretrain.running import train
from tests.training import write_config

BAD = 34  # this sample number is of step 7, which takes 30 to 37
REWIND = ("run.on_spike=rewind", "run.spike_factor=4")


def spoil(first: int, last: int = -1) -> None:
    """The loss of a step that takes one of these samples is ten times what it is; a level is known after few losses."""
    from pretrain.train import Run

    spikes.WARM_UP = 4
    forward_backward = Run.forward_backward

    def spoiled(self: Run, data: Any) -> torch.Tensor:
        loss = forward_backward(self, data)
        bad = any(first <= number <= max(first, last) for number in data.numbers)
        return loss * 10 if bad else loss

    Run.forward_backward = spoiled  # type: ignore[method-assign]


def events(run: Path) -> list[dict[str, Any]]:
    return [line for line in running.lines_of(run) if "event" in line]


def test_a_run_goes_back_and_past_the_samples(tmp_path: Path, tiny_data: Path) -> None:
    """From step 7 to the checkpoint of step 6, and on with sample 38: as a run that was told so at step 6 by hand."""
    ran = train(tmp_path, tiny_data, *REWIND, fault=partial(spoil, BAD))
    run = tmp_path / "run"
    assert ran.code == 0 and "back from step 7, and past the samples 30 to 37" in ran.out, ran.told
    [event] = events(run)
    assert (event["event"], event["step"], event["from_step"]) == ("rewind", 6, 7)
    assert event["skipped_samples"] == [30, 38] and event["rewinds"] == 1 and "the loss is" in event["spike"]
    state = running.manifest_of(run, 12)["state"]
    assert (state["skipped"], state["rewinds"], state["samples"], state["updates"]) == ([[30, 38]], 1, 86, 12)
    lines = {line["step"]: line for line in running.lines_of(run) if "batch_hash" in line}
    assert sorted(lines) == list(range(1, 13)), "each step once"
    assert [lines[step]["samples"] for step in (6, 7, 12)] == [30, 46, 86]
    assert lines[7]["batch_hash"] == hash_of(tiny_data, range(38, 46))

    assert (
        train(tmp_path / "told", tiny_data, *REWIND, "run.stop_at=0.5 of total", fault=partial(spoil, 10**9)).code == 0
    )
    manifest = running.checkpoint_folder(tmp_path / "told" / "run", 6) / "manifest.json"
    told = json.loads(manifest.read_text())
    told["state"] |= {"skipped": [[30, 38]], "samples": 38, "rewinds": 1}
    manifest.write_text(json.dumps(told))
    assert (
        running.command("train", tmp_path / "told" / "run", "run.stop_at=null", fault=partial(spoil, 10**9)).code == 0
    )
    running.assert_same_checkpoint(tmp_path / "told" / "run", run, 12)


def hash_of(shards: Path, numbers: range) -> str:
    import numpy as np

    wanted = np.array(numbers)
    stream = Stream([shards / "train"], 32, 1)
    return f"{batch_hash(wanted, stream.read(wanted)) % 2**64:016x}"


@pytest.mark.parametrize("step", [7, 8], ids=["before it is saved again", "later"])
def test_a_run_that_was_sent_back_and_killed_goes_on_bitwise(tmp_path: Path, tiny_data: Path, step: int) -> None:
    """The 7th step that is updated is the spike, the 8th the first behind the samples that were passed over."""
    options = (*REWIND, "monitor.tensorboard=true")
    assert train(tmp_path / "whole", tiny_data, *options, fault=partial(spoil, BAD)).code == 0
    running.train_killed(tmp_path, tiny_data, *options, fault=partial(spoil_and_kill, step))
    ran = train(tmp_path, tiny_data, *options, fault=partial(spoil, BAD))
    assert ran.code == 0 and "going on after step 6" in ran.out, ran.told
    assert len(events(tmp_path / "run")) == 1
    running.assert_same_run(tmp_path / "whole" / "run", tmp_path / "run")
    ours, theirs = (running.scalars_of(folder / "run")["loss/train"] for folder in (tmp_path, tmp_path / "whole"))
    assert ours == theirs


def spoil_and_kill(step: int) -> None:
    spoil(BAD)
    if step == 7:  # the checkpoint that it goes back to is loaded, and not yet written again
        from pretrain.saving import Saver

        running._on_call(Saver, "save", 4, running._die_between_saves)
    else:
        running.kill_in_step(step)


def test_ranks_go_back_together(tmp_path: Path, tiny_data: Path) -> None:
    """One of two has the bad sample. The course is that of one process."""
    options = (*REWIND, "batch.micro_size=1", "parallel.zero=1")
    config = write_config(tmp_path, tiny_data)
    arguments = ["train", str(config), *running.SHORT, *options]
    for ran in run_ranks(2, running.run_main, arguments, partial(spoil, BAD), timeout=60):
        assert ran.code == 0, ran.told
    assert train(tmp_path / "one", tiny_data, *options, fault=partial(spoil, BAD)).code == 0
    two, one = (running.numbers_of(folder / "run") for folder in (tmp_path, tmp_path / "one"))
    assert [line.get("batch_hash") for line in two] == [line.get("batch_hash") for line in one]
    losses = [line["loss"] for line in one if "loss" in line]
    assert [line["loss"] for line in two if "loss" in line] == pytest.approx(losses, rel=1e-5)
    assert [line["skipped_samples"] for line in two if "event" in line] == [[30, 38]]


def test_it_goes_back_a_bounded_number_of_times_and_then_stops(tmp_path: Path, tiny_data: Path) -> None:
    """All that comes is bad: once it goes back, then steps are left out, and too many in a row end the run."""
    options = (*REWIND, "run.max_rewinds=1", "run.max_bad_steps=3")
    ran = train(tmp_path, tiny_data, *options, fault=partial(spoil, BAD, 10**9))
    assert ran.code in (1, 4) and ran.out.count("back from step") == 1, ran.told
    assert ran.out.count("the step is skipped") == 3 and "stopped at step 9" in ran.out, ran.told
    assert "Traceback" not in ran.told and running.manifest_of(tmp_path / "run", 9)["state"]["updates"] == 6


def test_too_many_steps_without_a_finite_gradient_send_it_back_too(tmp_path: Path, tiny_data: Path) -> None:
    """Steps 5 and 6, as often as they are taken at first; the checkpoint of step 5 is none to go back to."""
    options = (*REWIND, "run.max_bad_steps=2", "checkpoint.every=1 steps")
    ran = train(tmp_path, tiny_data, *options, fault=partial(running.poison_steps, 5, 2, math.nan))
    assert ran.code == 0 and "2 steps in a row had no finite gradient; back from step 6" in ran.out, ran.told
    state = running.manifest_of(tmp_path / "run", 12)["state"]
    assert (state["skipped"], state["bad_steps"], state["updates"]) == ([[18, 30]], 0, 12)
    assert events(tmp_path / "run")[0]["step"] == 4


def test_a_spike_is_skipped(tmp_path: Path, tiny_data: Path) -> None:
    """Also by `rewind` while there is no checkpoint. Weights and moments stay the bits they were."""
    options = ("run.on_spike=skip", "run.spike_factor=4", "checkpoint={every: 1 steps, keep_last: 99}")
    ran = train(tmp_path, tiny_data, *options, fault=partial(spoil, BAD))
    assert ran.code == 0 and ran.out.count("the step is skipped") == 1, ran.told
    before = running.tensors_of(tmp_path / "run", 6)
    for name, tensor in running.tensors_of(tmp_path / "run", 7).items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name
    states = [running.manifest_of(tmp_path / "run", step)["state"] for step in (6, 7, 8)]
    assert [state["updates"] for state in states] == [6, 6, 7] and [state["samples"] for state in states] == [
        30,
        38,
        46,
    ]
    assert [(line["step"], line["event"]) for line in events(tmp_path / "run")] == [(7, "skip")]
    never = (*REWIND, "checkpoint.every=100 steps", "monitor.validate_every=null")
    ran = train(tmp_path / "rewind", tiny_data, *never, fault=partial(spoil, BAD))
    assert ran.code == 0 and "the step is skipped" in ran.out and "back from" not in ran.out, ran.told


# -- what is a spike -------------------------------------------------------------------------------------------------


def losses(count: int, seed: int = 0) -> list[float]:
    """As of a run: falling, with noise."""
    drawn = random.Random(seed)
    return [2 + 7 * math.exp(-step / 100) + drawn.gauss(0, 0.1) for step in range(count)]


def judge(values: list[float], factor: float = 8.0) -> list[int]:
    level, found = Level(), []
    for step, loss in enumerate(values):
        found += [step] if level.is_spike(loss, factor) else []
        level = level.after(loss, factor)
    return found


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    assert [judge(losses(2000, seed)) for seed in range(5)] == [[]] * 5


def test_spikes_are_found_however_many_came_before_and_of_any_height() -> None:
    for height in (2.0, 1e6):
        values = losses(600)
        planted = [300, 301, 302, 303, 400, 599]
        for step in planted:
            values[step] += height
        assert judge(values) == planted


def test_what_is_not_finite_moves_no_level() -> None:
    level = Level(50, 2.0, 0.1)
    assert not level.is_spike(math.inf, 8) and not level.is_spike(math.nan, 8)
    assert level.after(math.nan, 8) == level and not Level(3, 2.0, 0.0).is_spike(9.0, 8)


def test_samples_behind_ranges_that_are_passed_over() -> None:
    """Steps of 8: the third, that would begin with 16, begins with 24, and the fifth with 48."""
    ranges = passing(passing((), 16, 24), 40, 48)
    assert [past(sample, ranges) for sample in (0, 8, 16, 24, 32, 40)] == [0, 8, 24, 32, 48, 56]
    assert passing(ranges, 48, 56) == ((16, 24), (40, 56)), "a second time from the same checkpoint"


@pytest.mark.parametrize("skipped", [[[8, 4]], [[8]], [[8, 16], [12, 20]], "8", [[8, 16.0]], [[-1, 3]], None])
def test_ranges_of_a_checkpoint_are_checked(tmp_path: Path, skipped: Any) -> None:
    folder = running.checkpoint_folder(tmp_path, 3)
    formats.write_format_2(folder, {"w": ((2,), [1.0, 2.0])})
    assert open_checkpoint(folder).state.skipped == ((8, 16),)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state"]["skipped"] = skipped
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(folder)
