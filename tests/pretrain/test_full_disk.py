"""A disk that fails, or has no room, costs nothing that was saved, and the training goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pretrain import room, saving, storage
from tests.distributed import run_ranks
from tests.pretrain import running
from tests.pretrain.running import assert_refused, train
from tests.training import write_config


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 4 MiB where mounting is permitted; a plain folder elsewhere."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], stderr=subprocess.DEVNULL).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_before_save(count: int, disk: str, left: int) -> None:
    """Before the count-th save, leave so many bytes on the disk; without a disk of its own, limit the size of files."""

    def fill(*_: object) -> None:
        running.wait_for_saves()
        if not os.path.ismount(disk):
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(left, 100_000), resource.RLIM_INFINITY))
            return
        free = shutil.disk_usage(disk).free - left
        with contextlib.suppress(OSError):  # others write there too
            Path(disk, "filler").write_bytes(bytes(free))

    running._on_call(saving.Saver, "save", count, fill)


@pytest.mark.parametrize("left", [150_000, 0], ids=["half of it fits", "nothing fits"])
def test_a_disk_that_fills_during_a_save_costs_nothing_that_was_saved(
    small_disk: Path, tmp_path: Path, tiny_data: Path, left: int
) -> None:
    """From step 6 on nothing can be saved: the run goes on to its end, and says then that its last step is not there."""
    run = small_disk / "run"
    options = (f"run.dir={run}", "monitor.tensorboard=true")
    fault = partial(fill_before_save, 3, str(small_disk), left)
    ran = train(tmp_path, tiny_data, *options, fault=fault)
    assert "step 6: the checkpoint could not be written" in ran.out and "step 9/12" in ran.out, ran.told
    assert_refused(ran, "the checkpoint of step 12 could not be written", "the last good one is step 4", "Free space")
    assert f"python -m pretrain train {run}" in ran.err
    assert running.steps_of(run) == [3, 4]
    assert not list((run / "checkpoints").glob(".*")), "a partial folder stayed"
    (small_disk / "filler").unlink(missing_ok=True)
    again = running.command("train", run)
    assert again.code == 0 and "going on after step 4" in again.out, again.told
    assert train(tmp_path / "whole", tiny_data, "monitor.tensorboard=true").code == 0
    running.assert_same_run(tmp_path / "whole" / "run", run)


def fill_for_a_while(count: int, disk: str, steps: int) -> None:
    """The same; so many steps later there is room again, for which saving does not wait long."""
    from pretrain.train import Run

    room.FIRST_RETRY = 0.01
    fill_before_save(count, disk, 0)

    def empty(*_: object) -> None:
        running.wait_for_saves()
        Path(disk, "filler").unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    running._on_call(Run, "advance", steps, empty)


def test_what_a_full_disk_refused_is_saved_when_there_is_room(
    small_disk: Path, tmp_path: Path, tiny_data: Path
) -> None:
    """Checkpoints are due at 4, 8, 12 and 16; that of 8 fails. From step 10 on there is room, so one is saved then."""
    options = ("checkpoint={every: 4 steps, keep_last: 9}", "schedule.total=16 steps", "monitor.validate_every=null")
    fault = partial(fill_for_a_while, 2, str(small_disk), 10)
    ran = train(tmp_path, tiny_data, f"run.dir={small_disk / 'run'}", *options, fault=fault)
    assert ran.code == 0 and "step 8: the checkpoint could not be written" in ran.out, ran.told
    steps = running.steps_of(small_disk / "run")
    assert steps in ([4, 10, 12, 16], [4, 11, 12, 16])
    lines = running.lines_of(small_disk / "run")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 17)), "lines waited in memory"
    assert [line for line in lines if "loss" in line][-1]["failed_saves"] >= 1
    assert train(tmp_path / "whole", tiny_data, *options).code == 0
    running.assert_same_checkpoint(tmp_path / "whole" / "run", small_disk / "run", 16)


def fill_before_events(count: int, disk: str) -> None:
    """The same before the count-th scalars for TensorBoard, whose writer is a thread of its own."""
    from pretrain.board import Board

    def fill(*_: object) -> None:
        [events] = Path(disk, "run", "tensorboard").iterdir()
        if not os.path.ismount(disk):
            resource.setrlimit(resource.RLIMIT_FSIZE, (events.stat().st_size, resource.RLIM_INFINITY))
            return
        with open(Path(disk, "filler"), "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    running._on_call(Board, "scalars", count, fill)


def test_a_disk_that_fills_for_tensorboard_is_told_once(small_disk: Path, tmp_path: Path, tiny_data: Path) -> None:
    """Its thread's own traceback is not shown beside the message, whoever sees the failure first; the training goes on."""
    # Norms: more than the last page of the events file, which is the file's own however full the disk is, has room for.
    norms = ("monitor.norms_every=1 steps", "monitor.norms_by=weight")
    # One checkpoint, at the end (validations make some of the best): another that found no room would leave its own.
    late = ("checkpoint.every=12 steps", "monitor.validate_every=null")
    options = (f"run.dir={small_disk / 'run'}", "monitor.tensorboard=true", *late, *norms)
    for count in (1, 7):
        shutil.rmtree(small_disk / "run", ignore_errors=True)
        (small_disk / "filler").unlink(missing_ok=True)
        ran = train(tmp_path, tiny_data, *options, fault=partial(fill_before_events, count, str(small_disk)))
        assert ran.out.count("TensorBoard cannot be written") == 1 and "step 12/12" in ran.out, ran.told
        if os.path.ismount(small_disk):  # else it is the files of that size alone that find no room
            assert_refused(ran, "could not be written", "Free space and start again")


def test_tensorboard_is_written_again_when_there_is_room(tmp_path: Path) -> None:
    """By a writer that is made anew, for the step that the run has come to; what it cannot write ends nothing."""
    made: list[int] = []
    told: list[str] = []
    written: list[int] = []

    class Writer:
        def __init__(self, step: int) -> None:
            made.append(step)

        def scalars(self, step: int) -> None:
            if step in (3, 4):
                raise OSError(28, "No space left on device")
            written.append(step)

        def close(self, ended: bool) -> None:
            written.append(-1)

    lasting = room.Lasting(Writer, 0, told.append, "TensorBoard")
    for step in range(1, 8):
        lasting._pause.next -= 61 if step == 6 else 0  # a minute is over
        lasting.scalars(step)
    assert (made, written) == ([0, 6], [1, 2, -1, 6, 7])
    assert len(told) == 2 and "cannot be written" in told[0] and "step 6: TensorBoard is written again" in told[1]


def metrics_to_a_full_disk(step: int) -> None:
    """From this step on the file of metrics finds no space: /dev/full refuses every write, as the kernel does then. All
    is written of the second checkpoint, that of step 4, but its folder is still to be put in its place."""
    from pretrain.metrics import Metrics

    written = threading.Semaphore(0)
    put = saving._put_in_place

    def slowly(*args: Any) -> None:
        written.release()
        threading.Event().wait(0.3)
        put(*args)

    def replace(metrics: Metrics, fields: dict[str, object]) -> None:
        for _ in range(2):
            assert written.acquire(timeout=30)
        metrics._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115

    saving._put_in_place = slowly
    running._on_call(Metrics, "write", step, replace)


def test_a_disk_that_fills_during_a_report_is_told_and_the_run_goes_on_later(tmp_path: Path, tiny_data: Path) -> None:
    """The 8th report is of step 6: validations at 0 and 4 came before. No checkpoint says of a line that it was reported
    which is not on the disk."""
    ran = train(tmp_path, tiny_data, fault=partial(metrics_to_a_full_disk, 8))
    assert ran.out.count("metrics.jsonl cannot be written") == 1 and "step 12/12" in ran.out, ran.told
    assert_refused(
        ran, "the checkpoint of step 12 could not be written", "No space left", "the last good one is step 4"
    )
    assert train(tmp_path, tiny_data).code == 0
    assert train(tmp_path / "whole", tiny_data).code == 0
    running.assert_same_run(tmp_path / "whole" / "run", tmp_path / "run")


def fail_on_rank(rank: int, what: str) -> None:
    """The disk of one rank's host fails at the second save, for the tensors or (rank 0's) the manifest."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if int(os.environ["RANK"]) == rank:
        running._on_call(storage if what == "_write_file" else saving, what, 2, fail)


@pytest.mark.parametrize(("rank", "what"), [(1, "_write_file"), (0, "write_manifest"), (0, "_put_in_place")])
def test_a_disk_that_fails_one_rank_pauses_saving_on_all(tmp_path: Path, tiny_data: Path, rank: int, what: str) -> None:
    """No rank is left waiting for another, and the next checkpoint is whole."""
    config = write_config(tmp_path, tiny_data)
    arguments = ["train", str(config), *running.SHORT, "batch.micro_size=1", "checkpoint.keep_last=9"]
    for number, ran in enumerate(
        run_ranks(2, running.run_main, arguments, partial(fail_on_rank, rank, what), timeout=60)
    ):
        assert ran.code == 0, ran.told
        assert ("step 4: the checkpoint could not be written" in ran.out) == (number == 0)
        assert ("the last good one is step 3" in ran.out and "No space left" in ran.out) == (number == 0)
    assert running.steps_of(tmp_path / "run") == [3, 6, 8, 9, 12]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def fail_in_write() -> None:
    """A fault of our own while tensors are written."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    running._on_call(storage, "_write_file", 2, fail)


def test_another_fault_in_the_writing_thread_ends_the_run_and_is_not_called_a_full_disk(
    tmp_path: Path, tiny_data: Path
) -> None:
    ran = train(tmp_path, tiny_data, fault=fail_in_write)
    assert ran.code == 1 and "ZeroDivisionError" in ran.err and "could not be written" not in ran.err, ran.told
    assert running.steps_of(tmp_path / "run") == [3]
