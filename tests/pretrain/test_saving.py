"""A checkpoint is written while the training goes on: of the weights as they were, one at a time, whole or not at all."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from parallel.boxes import Box, HostMemory
from pretrain import saving, storage
from pretrain.train import Run
from tests.distributed import run_ranks
from tests.pretrain import running
from tests.pretrain.running import train
from tests.training import write_config

PATIENCE = 40  # seconds; what waits so long waits for ever


def hold_the_first_write(steps: int, rank: int = 0) -> None:
    """On one rank the first file is not written before the training has advanced by so many steps more."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    moved, done = threading.Condition(), [0]
    advance = Run.advance

    def count(*args: Any) -> None:
        advance(*args)
        with moved:
            done[0] += 1
            moved.notify()

    def hold(*_: Any) -> None:
        with moved:
            wanted = done[0] + steps
            assert moved.wait_for(lambda: done[0] >= wanted, PATIENCE), "the training waits for the disk"

    Run.advance = count  # type: ignore[method-assign]
    running._on_call(storage, "_write_file", 1, hold)


def test_training_goes_on_while_a_checkpoint_is_written_and_the_checkpoint_is_of_its_own_step(
    tmp_path: Path, tiny_data: Path
) -> None:
    """The first file is held back until two more steps have changed the weights; were it written in the loop, or from the
    weights themselves, this would fail."""
    options = ("monitor.validate_every=null", "checkpoint.every=4 steps", "checkpoint.keep_last=9")
    ran = train(tmp_path, tiny_data, *options, fault=partial(hold_the_first_write, 2))
    assert ran.code == 0, ran.told
    assert train(tmp_path / "usual", tiny_data, *options).code == 0
    for step in (4, 8, 12):
        running.assert_same_checkpoint(tmp_path / "usual" / "run", tmp_path / "run", step)
    running.assert_same_run(tmp_path / "usual" / "run", tmp_path / "run")


@pytest.mark.parametrize("zero", [0, 1])
def test_no_rank_waits_for_the_disk_of_another(tmp_path: Path, tiny_data: Path, zero: int) -> None:
    """The first file of rank 1 is held back until two more steps are done, which both ranks must do together."""
    config = write_config(tmp_path, tiny_data)
    options = [*running.SHORT, "batch.micro_size=1", f"parallel.zero={zero}", "monitor.validate_every=null"]
    fault = partial(hold_the_first_write, 2, 1)
    for ran in run_ranks(2, running.run_main, ["train", str(config), *options], fault, timeout=60):
        assert ran.code == 0, ran.told
    assert running.steps_of(tmp_path / "run") == [9, 12]


def watch_slow_writes() -> None:
    """The disk takes longer than a step, and a checkpoint that is begun while another is not in its place fails."""
    busy = threading.Lock()
    begin, write, finish = saving._begin, storage._write_file, saving._finish

    def enter(working: Path) -> None:
        assert busy.acquire(blocking=False), "two checkpoints at a time"
        begin(working)

    def slowly(path: Path, boxes: list[Box]) -> Any:
        threading.Event().wait(0.05)
        return write(path, boxes)

    def leave(*args: Any) -> None:
        finish(*args)
        busy.release()

    saving._begin, storage._write_file, saving._finish = enter, slowly, leave


def test_one_checkpoint_is_in_flight_at_most(tmp_path: Path, tiny_data: Path) -> None:
    """There is one a step; each waits for the one before, and that counts as standing still."""
    options = ("checkpoint.every=1 steps", "checkpoint.keep_last=20", "monitor.validate_every=null")
    ran = train(tmp_path, tiny_data, *options, fault=watch_slow_writes)
    assert ran.code == 0, ran.told
    assert running.steps_of(tmp_path / "run") == list(range(1, 13))
    stalls = [line.get("checkpoint_stall_seconds", 0.0) for line in running.lines_of(tmp_path / "run")]
    assert max(stalls) > 0.02


def fail_the_first_write() -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    running._on_call(storage, "_write_file", 1, fail)


def test_a_failed_write_is_told_before_the_next_save(tmp_path: Path, tiny_data: Path) -> None:
    options = ("schedule.total=60 steps", "checkpoint.every=30 steps", "monitor.validate_every=null")
    ran = train(tmp_path, tiny_data, *options, fault=fail_the_first_write)
    assert ran.code == 0, ran.told
    told, after = ran.out.split("step 30: the checkpoint could not be written")
    assert "No space left" in after and "step 60: saved" in after and "step 60/60" not in told
    assert running.steps_of(tmp_path / "run") == [60]


def test_every_kth_checkpoint_is_kept_for_ever(tmp_path: Path, tiny_data: Path) -> None:
    """Where the interval ends between two checkpoints, one is written there; a resumed run keeps the same ones."""
    options = ("checkpoint={every: 3 steps, keep_last: 1, keep_every: 4 steps}", "monitor.validate_every=null")
    running.train_killed(tmp_path, tiny_data, *options, fault=partial(running.kill_in_step, 8))
    assert running.steps_of(tmp_path / "run") == [4, 6]
    assert running.command("train", tmp_path / "run").code == 0
    assert running.steps_of(tmp_path / "run") == [4, 8, 12]


def test_an_interval_in_tokens_is_kept_where_it_ends(tmp_path: Path, tiny_data: Path) -> None:
    """Steps of 4, 4, 4, 6, 6, 6, 8, ... sequences of 32 tokens: 1000 tokens end in step 7, 2000 in step 11."""
    options = ("checkpoint={every: 3 steps, keep_last: 1, keep_every: 1000 tokens}", "monitor.validate_every=null")
    assert train(tmp_path, tiny_data, *options).code == 0
    assert running.steps_of(tmp_path / "run") == [7, 11, 12]


# -- the copy --------------------------------------------------------------------------------------------------------


def test_host_memory_joins_the_parts_and_is_used_again() -> None:
    host = HostMemory()
    tensors = [[torch.arange(3.0), torch.arange(3.0, 7.0)], [torch.full((2,), -1.0)]]
    first = host.copy(tensors)
    assert [copy.tolist() for copy in first] == [[0, 1, 2, 3, 4, 5, 6], [-1, -1]]
    memory = host.flat.data_ptr()
    assert host.copy([[torch.ones(9, requires_grad=True)]])[0].tolist() == [1.0] * 9
    assert host.flat.data_ptr() == memory and host.flat.numel() == 9


def test_nothing_but_the_share_is_held_while_it_is_written() -> None:
    """Pieces of a file are views of the copy, whatever their number."""
    values = torch.randn(3 * storage.PIECE_BYTES // 4 + 5)
    box = Box("w", "weight", (values.numel(),), (0,), values)
    header, *pieces = storage._pieces([box])
    base, end = values.data_ptr(), values.data_ptr() + values.nbytes
    addresses = [torch.frombuffer(piece, dtype=torch.uint8).data_ptr() for piece in pieces]
    assert len(pieces) == 4 and all(base <= address < end for address in addresses) and len(header) < 1000


def test_the_files_are_plain_safetensors_that_other_readers_know(tmp_path: Path) -> None:
    """safetensors reads them, and torch.distributed.checkpoint's own reader puts boxes of several files together."""
    whole = torch.arange(12.0).view(4, 3)
    for rank, rows in enumerate((slice(0, 1), slice(1, 4))):
        box = Box("layer.weight", "exp_avg", (4, 3), (rows.start, 0), whole[rows])
        storage.write_boxes([box], tmp_path, rank)
    loaded = load_file(tmp_path / "rank-00001-000.safetensors")
    assert torch.equal(loaded["exp_avg/layer.weight"], whole[1:])
    target = {"exp_avg/layer.weight": torch.zeros(4, 3)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(target["exp_avg/layer.weight"], whole)


def test_a_share_is_cut_into_files_of_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FILE_BYTES", 100)
    boxes = [
        Box(name, "weight", (size,), (0,), torch.full((size,), float(size)))
        for name, size in (("a", 10), ("b", 15), ("c", 40), ("d", 1))
    ]
    written = storage.write_boxes(boxes, tmp_path, 3)
    assert [(entry.tensor, entry.file[-15:-12]) for entry in written.entries] == [
        ("a", "000"),
        ("b", "000"),
        ("c", "001"),
        ("d", "002"),
    ]
    wanted = [storage.Wanted(box.name, box.shape, (0,), torch.zeros(box.shape)) for box in boxes]
    storage.read_boxes(wanted, tmp_path, written.entries)
    assert all(torch.equal(want.target, box.values) for want, box in zip(wanted, boxes, strict=True))
