"""A run that dies again and again and goes on under other layouts, against one that was never interrupted.

Each life of a schedule (`tests.pretrain.deaths`) is a real run in processes of its own. Beside it the ranks write down
what each step took (`tests.pretrain.kills`). Which of these steps the final weights depend on follows from the
checkpoints: each was written by one life, which went on from one that another had written, and so back to the first.
"""

from __future__ import annotations

import json
import math
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from pretrain import checkpoint
from pretrain.config.load import dump_config, load_config
from pretrain.errors import Exit
from tests.distributed import RankError
from tests.matrix import write_shards
from tests.pretrain import kills
from tests.pretrain.data.corpus import read_with_tarfile, write_source
from tests.pretrain.deaths import ANY_TIME, EPOCH, STEPS, Life, Schedule, case_of
from tests.pretrain.running import checkpoint_folder, command, lines_of, manifest_of, numbers_of, steps_of
from tests.training import Course, differences

LENGTH = 32  # tokens a sample
ALONE = "zero=0,micro=4"  # the layout to compare with: one process
MARK = "left-by-a-life"  # a file put into what a death left half written
TIMEOUT = 400  # seconds for a life, on a machine that has other work too


class Step(NamedTuple):
    """What one step took, over all ranks."""

    step: int
    samples: list[tuple[int, int, int]]  # sample number, hash of its tokens with it, and without

    @property
    def batch_hash(self) -> str:
        return f"{sum(keyed for _, keyed, _ in self.samples) % 2**64:016x}"


class Torture:
    """Schedules and what they are compared with, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = sorted(_write_epoch(folder))
        self._whole: dict[str, Path] = {}

    def run(self, schedule: Schedule) -> None:
        """Go through a schedule and check everything; what fails says how the schedule went."""
        lives = _Lives(self, self.folder / f"seed-{schedule.seed}", schedule)
        try:
            for number, life in enumerate(schedule.lives, start=1):
                lives.live(number, life)
            self._check_end(lives)
        except Exception as error:
            error.add_note(f"{schedule}\n{lives.told}\nmake torture ARGS='--schedules 1 --first-seed {schedule.seed}'")
            raise

    def uninterrupted(self, layout: str) -> Path:
        """A run to compare with, made once a layout."""
        if layout not in self._whole:
            folder = self.folder / f"uninterrupted-{len(self._whole)}"
            folder.mkdir()
            ran = command("train", self.config(folder, layout), world=case_of(layout).processes, timeout=TIMEOUT)
            assert ran.code == 0, ran.told
            self._whole[layout] = folder / "run"
        return self._whole[layout]

    def config(self, folder: Path, layout: str, every: int = 3, keep_last: int = 2) -> Path:
        """A config file in the folder, of a run in it."""
        path = folder / "config.yaml"
        path.write_text(dump_config(case_of(layout).config))
        where = [f"data.train={self.folder}/train", f"data.validation={self.folder}/shards/validation"]
        often = [f"checkpoint.every={every} steps", f"checkpoint.keep_last={keep_last}"]
        path.write_text(dump_config(load_config(path, [*where, *often, f"run.dir={folder}/run"])))
        return path

    # -- at the end ----------------------------------------------------------------------------------------------------

    def _check_end(self, lives: _Lives) -> None:
        run, whole = lives.run, self.uninterrupted(ALONE)
        logged, expected = ([_kind(line) for line in lines_of(path)] for path in (run, whole))
        assert [step for step, kind in expected if kind == "loss"] == list(range(1, STEPS + 1))
        assert logged == expected, f"metrics.jsonl has not each line once: {logged}"
        self._check_samples(lives.depends[STEPS], run)
        found = list(differences(_course(whole), _course(run)))
        assert not found, "\n".join(found)
        assert _exact_state(run) == _exact_state(whole)
        assert json.loads((run / "summary.json").read_text())["reason"] == "finished"
        if len(set(lives.schedule.layouts)) == 1:
            self._check_bitwise(run, self.uninterrupted(lives.schedule.layouts[0]))

    def _check_samples(self, steps: list[Step], run: Path) -> None:
        """What the final weights depend on: each sample once, and the batches of which metrics.jsonl tells."""
        assert [step.step for step in steps] == list(range(1, STEPS + 1))
        samples = [sample for step in steps for sample in step.samples]
        assert sorted(number for number, _, _ in samples) == list(range(EPOCH)), "not each sample number once"
        assert sorted(content for _, _, content in samples) == self.contents, "not each sequence of the shards once"
        logged = [line["batch_hash"] for line in lines_of(run) if "loss" in line]
        assert logged == [step.batch_hash for step in steps], "metrics.jsonl tells of other batches"

    def _check_bitwise(self, run: Path, whole: Path) -> None:
        assert numbers_of(run) == numbers_of(whole), "the same layout all along, but other numbers"
        ours, theirs = logical_tensors(run), logical_tensors(whole)
        other = [
            name for name in theirs if not torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32))
        ]
        assert not other, f"the same layout all along, but other bits in {other}"
        assert manifest_of(run, STEPS)["state"] == manifest_of(whole, STEPS)["state"]


class _Lives:
    """One run through its lives."""

    def __init__(self, torture: Torture, folder: Path, schedule: Schedule) -> None:
        self.torture, self.folder, self.schedule = torture, folder, schedule
        self.run, self.told = folder / "run", ""
        self.depends: dict[int, list[Step]] = {}  # by the step of a checkpoint that is there: the steps in it
        self.written: dict[int, tuple[int, int]] = {}  # by the step of a checkpoint that is there: which file it is
        folder.mkdir()

    def live(self, number: int, life: Life) -> None:
        records = self.folder / f"life-{number}"
        records.mkdir()
        before = max(self.depends, default=0)
        _end_as_planned(life, self._start(life, records))
        steps = _steps_of(records, before)
        last = max(steps, default=before)
        self.told += f"life {number}: steps {before + 1} to {last}, then checkpoints {steps_of(self.run)}\n"
        self._take_in(self.depends.get(before, []), steps)
        newest = self._check_checkpoints(before, last)
        died = life.death is not None and life.death.number == signal.SIGKILL
        if not died:
            self._check_kept(before, last)
        self._check_half_written(before, newest, died)

    def _start(self, life: Life, records: Path) -> int:
        """Run it to its end; the exit code, negative for a signal."""
        schedule = self.schedule
        config = self.torture.config(self.folder, life.layout, schedule.every, schedule.keep_last)
        fault = partial(kills.arm, records, life.death)
        try:
            ran = command("train", config, fault=fault, world=case_of(life.layout).processes, timeout=TIMEOUT)
        except RankError as error:
            if "was killed by signal 9" not in str(error):
                raise
            return -9
        assert "damaged" not in ran.told and ran.code in (0, Exit.STOPPED), ran.told
        return ran.code

    def _take_in(self, base: list[Step], steps: dict[int, Step]) -> None:
        """The checkpoints that are there now: what those that this life wrote depend on."""
        there = {step: _identity(checkpoint_folder(self.run, step)) for step in steps_of(self.run)}
        most = max(len(self.written), self.schedule.keep_last + 1)  # the best too; and one more when it died in a save
        assert len(there) <= most + 1, f"old checkpoints are left: {sorted(there)}"
        new = [step for step in there if self.written.get(step) != there[step]]
        for step in new:
            assert step in steps, f"there is a checkpoint of step {step}, which not all ranks have ended"
            self.depends[step] = base + [steps[at] for at in range(len(base) + 1, step + 1)]
        self.depends = {step: self.depends[step] for step in there}
        self.written = there

    def _check_checkpoints(self, before: int, last: int) -> int:
        """They are whole and not too old. The step of the newest."""
        warnings: list[str] = []
        found = checkpoint.latest(self.run, warnings.append)
        for step in steps_of(self.run):
            checkpoint.open_checkpoint(checkpoint_folder(self.run, step))
        assert not warnings, warnings
        newest = found.state.step if found is not None else 0
        # The save before the last that was due is over: no more than one is under way.
        least = max(before, (last - 1) // self.schedule.every * self.schedule.every - self.schedule.every)
        assert newest >= least, f"step {last} was done, from {before} on, but step {newest} is saved"
        return newest

    def _check_kept(self, before: int, last: int) -> None:
        """When a life has ended well: its last checkpoints are there, and the best of all."""
        best = _best_steps(self.run)
        own = range(before + 1, last + 1)
        saved = [step for step in own if step % self.schedule.every == 0 or step in {*best, last}]
        keep = {*saved[-self.schedule.keep_last :], best[-1]} - {0}  # nothing is saved before the first step
        assert keep <= self.written.keys(), f"of {sorted(keep)} there are {sorted(self.written)}"

    def _check_half_written(self, before: int, newest: int, died: bool) -> None:
        """A save removes what the lives before left half written. Marks what is left now."""
        folder = self.run / "checkpoints"
        assert not list(folder.glob(f"step-*/{MARK}")), "what a life left half written became a checkpoint"
        saved_next = newest > (before // self.schedule.every + 1) * self.schedule.every  # and so one save is over
        assert not (saved_next and list(folder.glob(f".*/{MARK}"))), "what a life left half written outlived a save"
        half_written = list(folder.glob(".*"))
        assert died or not half_written, f"left half written: {half_written}"
        for path in half_written:
            (path / MARK).touch()


def _end_as_planned(life: Life, code: int) -> None:
    if life.death is None:
        assert code == 0, f"exit code {code} in the last life"
    elif life.death.kind != ANY_TIME or code != 0:  # at any time may be after the end
        assert code == (-9 if life.death.number == signal.SIGKILL else Exit.STOPPED), (
            f"exit code {code}: did not die {life.death}"
        )


# -- what the ranks wrote down -----------------------------------------------------------------------------------------


def _steps_of(records: Path, before: int) -> dict[int, Step]:
    """The steps of a life that all its ranks ended, by number; ranks that share samples had the same."""
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in records.glob("rank-*.jsonl")]
    for rank in ranks:
        assert [line["step"] for line in rank] == list(range(before + 1, before + 1 + len(rank))), "steps are left out"
        assert all(line["applied"] for line in rank)
    steps = {}
    for lines in zip(*ranks, strict=False):
        slices: dict[int, Any] = {}
        for line in lines:
            assert slices.setdefault(line["slice"], line["samples"]) == line["samples"], "ranks of a replica part"
        samples = [tuple(sample) for part in slices.values() for sample in part]
        steps[lines[0]["step"]] = Step(lines[0]["step"], samples)
    return steps


def _identity(folder: Path) -> tuple[int, int]:
    """Tells a checkpoint from another of the same step."""
    status = (folder / "manifest.json").stat()
    return status.st_ino, status.st_mtime_ns


# -- runs to compare ---------------------------------------------------------------------------------------------------


def _kind(line: dict[str, Any]) -> tuple[int, str]:
    return line["step"], "loss" if "loss" in line else "validation"


def _best_steps(run: Path) -> list[int]:
    """Steps whose validation was better than all before."""
    lowest, steps = math.inf, []
    for line in lines_of(run):
        if line.get("validation_loss", math.inf) < lowest:
            lowest = line["validation_loss"]
            steps.append(line["step"])
    return steps


def _course(run: Path) -> Course:
    lines, tensors = lines_of(run), logical_tensors(run)
    moments = {name: values for name, values in tensors.items() if name.startswith("exp_avg/")}
    weights = {name: values for name, values in tensors.items() if not name.startswith("exp_avg")}
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return Course([line for line in lines if "loss" in line], validated, {}, {}, weights, moments, [])


def logical_tensors(run: Path) -> dict[str, Tensor]:
    """Weights and moments at the end, put together from the files by what the manifest says of each."""
    folder, manifest = checkpoint_folder(run, STEPS), manifest_of(run, STEPS)
    files = {name: load_file(folder / name) for name in manifest["files"]}
    whole: dict[str, Tensor] = {}
    for name, shape, offset, size, file in manifest["boxes"]:
        tensor = whole.setdefault(name, torch.full(shape, torch.nan))
        tensor[tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))] = files[file][
            name
        ]
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def _exact_state(run: Path) -> dict[str, Any]:
    return {name: value for name, value in manifest_of(run, STEPS)["state"].items() if name != "best_loss"}


def _write_epoch(folder: Path) -> list[int]:
    """Shards of just one epoch in folder/train; the hash of each sequence in them."""
    from pretrain.tokenization.foreign import load_tokenizer

    write_shards(folder / "shards")
    tokens = read_with_tarfile(folder / "shards" / "train")[: EPOCH * LENGTH + 1]
    tokenizer = load_tokenizer(folder / "shards" / "train" / "tokenizer.model")
    write_source(folder / "train", tokens, tokenizer, tokens_per_chunk=1024)
    rows = np.lib.stride_tricks.sliding_window_view(tokens, LENGTH + 1)[::LENGTH]
    assert len(rows) == EPOCH
    return [xxhash.xxh64_intdigest(row.astype("<u4").tobytes()) for row in rows]
