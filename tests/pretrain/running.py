"""Real runs for the tests of the training loop: commands in processes of their own, and faults at chosen places.

`command` forks the tests' warm process, which has torch and its kin imported, and calls the program's `main` there: half
a second a run where a fresh interpreter takes four. A fault is a function that this process calls first; it makes the
program kill itself, or get a signal, at a place that is the same every time.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.distributed import RankError, run_ranks
from tests.training import write_config

# Fields of metrics.jsonl that a clock or the machine decides.
MEASURED = (
    *("tokens_per_second", "step_seconds", "data_seconds", "memory_bytes", "mfu", "hfu"),
    *("checkpoint_stall_seconds", "checkpoint_write_seconds"),
    *("slowest_rank", "slowest_rank_seconds", "median_rank_seconds"),
)
# A smaller model still, with a batch-size ramp (4, 4, 4, 6, 6, 6, 8, ...), and validations that are quick.
SHORT = (
    "model.num_layers=2",
    "batch={size: 8, micro_size: 2, ramp: {start: 4, increment: 2, length: 6 steps}}",
    "schedule.total=12 steps",
    "monitor.validate_every=4 steps",
    "monitor.validation_samples=20",
    "checkpoint.every=3 steps",
)
Fault = Callable[[], None]


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        return self.out + self.err


def command(*arguments: str | Path, fault: Fault | None = None, world: int = 1, timeout: float = 60) -> Ran:
    """`python -m pretrain ARGUMENTS` in a forked process (on rank 0 of several): its exit code and output."""
    ran: Ran = run_ranks(world, run_main, [str(argument) for argument in arguments], fault, timeout=timeout)[0]
    return ran


def killed(*arguments: str | Path, fault: Fault, timeout: float = 60) -> None:
    """The same for a command that must die of SIGKILL at the fault."""
    with pytest.raises(RankError, match="killed by signal 9"):
        command(*arguments, fault=fault, timeout=timeout)


def run_main(arguments: list[str], fault: Fault | None = None) -> Ran:
    """The command in this process, which is a rank's: how it ended and what it wrote."""
    from pretrain.__main__ import main

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            if fault is not None:
                fault()
            code = main(arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except Exception:  # as an interpreter would
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return Ran(code, out.read(), err.read())


# -- runs ------------------------------------------------------------------------------------------------------------


def train(
    folder: Path, shards: Path, *overrides: str, fault: Fault | None = None, world: int = 1, timeout: float = 60
) -> Ran:
    """`train` with the tiny config, shortened (SHORT), into folder/run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder, shards)
    return command("train", config, *SHORT, *overrides, fault=fault, world=world, timeout=timeout)


def train_killed(folder: Path, shards: Path, *overrides: str, fault: Fault, timeout: float = 60) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    killed("train", write_config(folder, shards), *SHORT, *overrides, fault=fault, timeout=timeout)


@functools.cache
def trained(shards: Path) -> Path:
    """One finished run for all tests that only read: 12 steps, with TensorBoard and texts, every checkpoint kept."""
    folder = shards.parent / "trained"
    extra = ("monitor.tensorboard=true", "monitor.sample_every=6 steps", "monitor.sample_tokens=8")
    ran = train(folder, shards, *extra, "monitor.peak_tflops=0.5", "checkpoint.keep_last=9")
    assert ran.code == 0, ran.told
    (folder / "stdout").write_text(ran.out)
    (folder / "stderr").write_text(ran.err)
    return folder / "run"


def steps_of(run: Path) -> list[int]:
    """Steps of the checkpoints, by their folders alone."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def manifest_of(run: Path, step: int) -> Any:
    return json.loads((checkpoint_folder(run, step) / "manifest.json").read_text())


def content_of(run: Path) -> dict[Path, bytes]:
    """All files but the logs, which say that it was started again."""
    files = (path for path in run.rglob("*") if path.is_file() and path.parent.name != "logs")
    return {path: path.read_bytes() for path in files}


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint of one process, by safetensors itself."""
    from safetensors.torch import load_file

    files = sorted(checkpoint_folder(run, step).glob("*.safetensors"))
    return {f"{path.name}:{name}": value for path in files for name, value in load_file(path).items()}


def lines_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, read as strictly as JSON is meant."""

    def refuse(word: str) -> None:
        raise AssertionError(f"metrics.jsonl holds {word}, which is no JSON")

    text = (run / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def numbers_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl but for what is measured."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines_of(run)]


def scalars_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars by tag, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_checkpoint(one: Path, other: Path, step: int) -> None:
    """Weights, both moments and the state of two runs are the same bits."""
    ours, theirs = tensors_of(one, step), tensors_of(other, step)
    assert ours.keys() == theirs.keys()
    assert {name.split(":")[1].split("/")[0] for name in ours} > {"exp_avg", "exp_avg_sq"}
    for name, value in ours.items():
        assert torch.equal(value.view(torch.int32), theirs[name].view(torch.int32)), name
    assert manifest_of(one, step)["state"] == manifest_of(other, step)["state"]


def assert_same_run(one: Path, other: Path) -> None:
    """Nothing but the clock tells the two runs apart."""
    last = steps_of(one)[-1]
    assert steps_of(one) == steps_of(other)
    assert_same_checkpoint(one, other, last)
    assert numbers_of(one) == numbers_of(other)
    assert not list((other / "checkpoints").glob(".*")), "a partial folder was left"


def assert_refused(ran: Ran, *words: str) -> None:
    """One readable message for a user's mistake: exit code 2, no traceback, and these words in it."""
    assert ran.code == 2, ran.told
    assert "Traceback" not in ran.told, ran.told
    assert ran.err.count("error: ") == 1, ran.told
    for word in words:
        assert word in ran.err, f"{word!r} is missing in:\n{ran.err}"


# -- faults ----------------------------------------------------------------------------------------------------------


def _on_call(owner: Any, name: str, count: int, action: Callable[..., None]) -> None:
    """Call `action` with the arguments before the count-th call of a function."""
    original, calls = getattr(owner, name), [0]

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            action(*args, **options)
        return original(*args, **options)

    setattr(owner, name, call)


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_between_saves(*_: Any) -> None:
    """What is in flight is written first, so that it is known what is on the disk."""
    wait_for_saves()
    _die()


def wait_for_saves() -> None:
    from pretrain.saving import THREAD

    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()


def kill_in_step(count: int) -> None:
    """SIGKILL when the gradients of the count-th step are there and the update is not."""
    from parallel.replicated import PlainEngine
    from parallel.sharded import DeepSpeedEngine

    for engine in (PlainEngine, DeepSpeedEngine):
        _on_call(engine, "step", count, _die_between_saves)


def kill_in_step_with_lazy_board(count: int) -> None:
    """The same, while TensorBoard's writer, which works in a thread of its own, is as late as it may be: nothing is
    written before it is flushed."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    waiting: list[Any] = []
    add, flush = EventFileWriter.add_event, EventFileWriter.flush

    def write_all(self: EventFileWriter) -> None:
        while waiting:
            add(self, waiting.pop(0))
        flush(self)

    EventFileWriter.add_event = lambda self, event: waiting.append(event)
    EventFileWriter.flush = write_all
    kill_in_step(count)


def kill_in_tensors(count: int) -> None:
    """SIGKILL when half of the count-th file of tensors is written."""
    from pretrain import storage

    def half(path: Path, boxes: Any) -> None:
        content = b"".join(storage._pieces(boxes))
        path.write_bytes(content[: len(content) // 2])
        _die()

    _on_call(storage, "_write_file", count, half)


def kill_in_manifest(count: int) -> None:
    """SIGKILL when half of the count-th manifest is written."""
    from pretrain import saving

    def half(folder: Path, *rest: Any) -> None:
        (folder / "manifest.json").write_text('{"format": 1, "state": {"step": ')
        _die()

    _on_call(saving, "write_manifest", count, half)


def kill_before_rename(count: int) -> None:
    """SIGKILL when all of the count-th checkpoint is written, but it is not in its place."""
    from pretrain import saving

    _on_call(saving, "_put_in_place", count, _die)


def kill_in_removal() -> None:
    """SIGKILL in the first removal of an old checkpoint: one of its files is gone."""
    import shutil

    original = shutil.rmtree

    def removing(folder: Any, *args: Any, **options: Any) -> None:
        if Path(folder, "manifest.json").exists():
            next(Path(folder).glob("*.safetensors")).unlink()
            _die()
        original(folder, *args, **options)

    shutil.rmtree = removing  # type: ignore[assignment]


def signal_in_step(count: int, *numbers: int) -> None:
    """Send this process the signals, one after the other, in the middle of its count-th step."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    at_step(count, send)


def at_step(count: int, action: Callable[[], None]) -> None:
    """Call it in the middle of this process's count-th step."""
    from parallel.replicated import PlainEngine
    from parallel.sharded import DeepSpeedEngine

    for engine in (PlainEngine, DeepSpeedEngine):
        _on_call(engine, "step", count, lambda *_: action())


def poison_steps(first: int, count: int, value: float) -> None:
    """In steps `first` up to `first + count` one weight of the final norm is not finite, so neither is the loss."""
    from parallel.schedules import Schedule

    original, calls = Schedule.run, [0]

    def run(self: Schedule, batches: Any, scale: float, forward_only: bool = False) -> torch.Tensor:
        calls[0] += not forward_only
        if forward_only or not first <= calls[0] < first + count:
            return original(self, batches, scale, forward_only)
        module: Any = self.stages[-1].module
        weight = module.norm.weight.data
        kept = weight[0].clone()
        weight[0] = value
        loss = original(self, batches, scale)
        weight[0] = kept
        assert not math.isfinite(loss.item())
        return loss

    Schedule.run = run  # type: ignore[method-assign]


def script_validations(*losses: float) -> None:
    """Validations find these losses, one after the other."""
    from pretrain.validation import Result, Validation

    found = iter(losses)
    Validation.run = lambda self, schedule: Result(next(found), 1.0, 1, {})  # type: ignore[method-assign]
