"""A checkpoint is whole or not there, and the newest whole one is taken. Disks that fail: test_full_disk.py."""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from pretrain import checkpoint, opening, saving
from pretrain.errors import UserError
from tests.distributed import run_ranks
from tests.pretrain import formats, running
from tests.pretrain.running import assert_refused, train


@pytest.fixture
def run(tmp_path: Path, tiny_data: Path) -> Path:
    """A copy of the trained run, with checkpoints of the steps 3, 4, 6, 8, 9 and 12, to damage."""
    return Path(shutil.copytree(running.trained(tiny_data), tmp_path / "run"))


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def damage(run: Path, step: int, how: str) -> None:
    folder = running.checkpoint_folder(run, step)
    [tensors] = folder.glob("*.safetensors")
    if how == "a flipped bit":
        flip_a_bit(tensors, tensors.stat().st_size // 2)
    elif how == "a flipped bit in the manifest":
        flip_a_bit(folder / "manifest.json", 1)
    elif how == "a cut file":
        os.truncate(tensors, tensors.stat().st_size - 1)
    elif how == "a cut manifest":
        os.truncate(folder / "manifest.json", 1000)
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "no file":
        tensors.unlink()
    elif how == "nothing in it":
        shutil.rmtree(folder)
        folder.mkdir()


DAMAGES = (
    "a flipped bit",
    "a flipped bit in the manifest",
    "a cut file",
    "a cut manifest",
    "no manifest",
    "no file",
    "nothing in it",
)


# -- what is written -------------------------------------------------------------------------------------------------


def test_the_manifest_holds_the_sha256_and_size_of_each_file(tiny_data: Path) -> None:
    run = running.trained(tiny_data)
    for step in running.steps_of(run):
        folder = running.checkpoint_folder(run, step)
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        expected = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
        }
        assert running.manifest_of(run, step)["files"] == expected
        assert all(name.endswith(".safetensors") for name in files)


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path, tiny_data: Path) -> None:
    """The best, of step 4, is older than the last two; the older best of step 2 goes when a better one is there."""
    losses = partial(running.script_validations, 9.0, 8.0, 7.0, 7.5, 7.5, 7.5, 7.5)
    options = ("monitor.validate_every=2 steps", "checkpoint={every: 5 steps, keep_last: 2}")
    assert train(tmp_path, tiny_data, *options, fault=losses).code == 0
    assert running.steps_of(tmp_path / "run") == [4, 10, 12]
    assert running.manifest_of(tmp_path / "run", 12)["state"]["best_step"] == 4


def test_the_best_is_not_kept_where_that_is_off(tmp_path: Path, tiny_data: Path) -> None:
    losses = partial(running.script_validations, 9.0, 8.0, 7.0, 7.5, 7.5, 7.5, 7.5)
    options = ("monitor.validate_every=2 steps", "checkpoint={every: 5 steps, keep_last: 2, keep_best: false}")
    assert train(tmp_path, tiny_data, *options, fault=losses).code == 0
    assert running.steps_of(tmp_path / "run") == [10, 12]


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_that_names_it(run: Path, how: str) -> None:
    damage(run, 12, how)
    warnings: list[str] = []
    found = checkpoint.latest(run, warnings.append)
    assert found is not None and found.state.step == 9
    [warning] = warnings
    assert "step-00000012" in warning and "damaged" in warning


@pytest.mark.parametrize("byte", range(8))
def test_no_flipped_bit_of_a_tensor_file_goes_unnoticed(run: Path, byte: int) -> None:
    """Header, first and last values, anywhere."""
    [path] = running.checkpoint_folder(run, 12).glob("*.safetensors")
    flip_a_bit(path, (path.stat().st_size - 1) * byte // 7)
    with pytest.raises(UserError, match="altered since it was written"):
        checkpoint.open_checkpoint(path.parent)


def test_a_run_resumes_from_the_last_whole_checkpoint_and_ends_the_same(run: Path, tiny_data: Path) -> None:
    damage(run, 12, "a flipped bit")
    damage(run, 9, "no manifest")
    ran = running.command("train", run)
    assert ran.code == 0 and "going on after step 8" in ran.out, ran.told
    assert ran.out.count("warning: passing over a damaged checkpoint") == 2
    running.assert_same_run(running.trained(tiny_data), run)


def test_damaged_checkpoints_do_not_push_out_the_whole_ones(tmp_path: Path, tiny_data: Path) -> None:
    """With keep_last 1: resumed from step 8 as 12 is damaged, the checkpoint of step 9 must outlive that of step 12, or a
    kill right after it would leave nothing."""
    options = ("checkpoint={every: 3 steps, keep_last: 1, keep_best: false}", "monitor.validate_every=null")
    assert train(tmp_path, tiny_data, *options).code == 0
    run = tmp_path / "run"
    shutil.copytree(running.checkpoint_folder(run, 12), tmp_path / "whole")
    damage(run, 12, "a flipped bit")
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    running.train_killed(tmp_path / "again", tiny_data, *options, fault=partial(running.kill_in_step, 8))
    assert running.steps_of(tmp_path / "again" / "run") == [6]
    shutil.move(running.checkpoint_folder(run, 12), running.checkpoint_folder(tmp_path / "again" / "run", 12))
    running.killed("train", tmp_path / "again" / "run", fault=partial(running.kill_in_step, 5))
    assert running.steps_of(tmp_path / "again" / "run") == [9]
    assert running.command("train", tmp_path / "again" / "run").code == 0
    running.assert_same_run(_with(run, tmp_path / "whole"), tmp_path / "again" / "run")


def _with(run: Path, whole: Path) -> Path:
    """The run with its last checkpoint put back."""
    shutil.copytree(whole, running.checkpoint_folder(run, 12))
    return run


def test_where_all_are_damaged_nothing_is_resumed_and_nothing_is_lost(run: Path) -> None:
    for step, how in zip(running.steps_of(run), DAMAGES, strict=False):
        damage(run, step, how)
    before = running.content_of(run)
    ran = running.command("train", run)
    assert_refused(ran, "all 6 checkpoints are damaged", str(run))
    assert running.content_of(run) == before


def test_prune_leaves_the_newest_up_to_the_step_and_the_kept(tmp_path: Path) -> None:
    """And clears away what is half written, half removed, or beyond; other files stay."""
    for name in ("step-00000002", "step-00000004", "step-00000006", "step-00000008", "step-00000099"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    (tmp_path / "checkpoints" / ".step-00000007.partial").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").touch()
    saving.prune(tmp_path, 8, 2, lambda step: step == 2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["notes.txt", "step-00000002", "step-00000006", "step-00000008"]


# -- several ranks ---------------------------------------------------------------------------------------------------


def find_together(run: Path) -> tuple[int, list[str], list[str]]:
    """In a rank: the step of the newest whole checkpoint, the files that were hashed for it, the warnings."""
    from parallel.grid import start_grid
    from parallel.layout import Layout

    names: list[str] = []
    warnings: list[str] = []
    hash_file = opening._sha256

    def counted(path: Path) -> str:
        names.append(f"{path.parent.name}/{path.name}")
        return hash_file(path)

    opening._sha256 = counted
    found = checkpoint.latest(run, warnings.append, start_grid(Layout(data=3), 60))
    assert found is not None
    return found.state.step, names, warnings


def test_each_file_is_hashed_by_one_rank_and_all_pass_over_what_one_finds_damaged(tmp_path: Path) -> None:
    tensors = {"a": ((4, 2), [float(value) for value in range(8)]), "b": ((3,), [1.0, 2.0, 3.0])}
    for step in (3, 5):
        folder = running.checkpoint_folder(tmp_path, step)
        formats.write_format_1(folder, tensors)
        manifest = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(manifest.replace('"step": 3', f'"step": {step}'))
    first, second = sorted(path.name for path in folder.glob("*.safetensors"))
    assert [hashed for _, hashed, _ in run_ranks(3, find_together, tmp_path)] == [
        [f"step-00000005/{first}"],
        [f"step-00000005/{second}"],
        [],
    ]
    flip_a_bit(folder / second, 100)
    for step, hashed, warnings in run_ranks(3, find_together, tmp_path):
        assert step == 3 and len(hashed) <= 2
        assert len(warnings) == 1 and f"step-00000005/{second}" in warnings[0] and "altered" in warnings[0]
