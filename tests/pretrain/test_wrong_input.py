"""A mistake costs a second: one message that names the field and the mend, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import ctypes
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from pretrain.data.prepare import prepare
from pretrain.data.preparing.options import Options
from tests.distributed import run_python
from tests.pretrain import running
from tests.pretrain.running import Ran, assert_refused, command, train
from tests.training import write_config


def real(*arguments: str | Path) -> Ran:
    """`python -m pretrain` in an interpreter of its own; for mistakes that are found without torch."""
    ran = run_python(["pretrain", *arguments], timeout=60)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.fixture
def config(tmp_path: Path, tiny_data: Path) -> Path:
    return write_config(tmp_path, tiny_data)


@pytest.fixture(scope="module")
def run(tiny_data: Path) -> Path:
    """A finished run that nobody may write to."""
    return running.trained(tiny_data)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return running.content_of(folder)


# -- before the first step -------------------------------------------------------------------------------------------


def test_a_config_that_does_not_exist(tmp_path: Path) -> None:
    assert_refused(real("train", tmp_path / "none.yaml"), "none.yaml: there is no such file", "configs/gpt/demo.yaml")


def test_a_layout_that_does_not_divide_is_told_with_all_that_is_wrong(config: Path, tmp_path: Path) -> None:
    ran = real("train", config, "parallel.tensor=3", "parallel.pipeline=5", "batch.micro_size=3", "parallel.zero=2")
    words = ("parallel.tensor: 3 does not divide model.num_heads 4", "the nearest that works: 2", "parallel.pipeline")
    assert_refused(ran, *words, "parallel.zero: stage 2 shares out gradients", "does not divide the 1 processes")
    assert not (tmp_path / "run").exists()


def test_a_micro_size_that_does_not_divide_the_ramp(config: Path) -> None:
    ran = real("train", config, "batch={size: 8, micro_size: 4, ramp: {start: 2, increment: 2, length: 6 steps}}")
    assert_refused(ran, "batch.", "micro_size", "2 sequences")


def test_unknown_and_wrong_fields_are_told_together(config: Path) -> None:
    ran = real("train", config, "model.num_layer=2", "optimizer.learning_rate=fast", "schedule.total=5", "nonsense")
    assert_refused(ran, "model.num_layers", "optimizer.learning_rate", "schedule.total", "section.key=value")


def test_a_sequence_longer_than_the_data(config: Path, tiny_data: Path) -> None:
    ran = real("train", config, "data.seq_length=1000000", "model.max_positions=null")
    assert_refused(ran, "1000000 tokens is longer than the data", str(tiny_data))


def test_a_sequence_that_does_not_divide_the_chunks(config: Path) -> None:
    assert_refused(real("train", config, "data.seq_length=48"), "48", "The nearest that do are 32 and 64")


def test_a_folder_without_shards(config: Path, tmp_path: Path) -> None:
    assert_refused(real("train", config, f"data.train={tmp_path}"), str(tmp_path), "manifest.json")


def test_a_run_folder_with_foreign_files(config: Path, tmp_path: Path) -> None:
    """Also one whose config.yaml is the user's own: nothing of theirs is written over."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("ten years of work")
    for folder in (tmp_path / "notes", tmp_path):
        before = snapshot(tmp_path)
        assert_refused(
            real("train", config, f"run.dir={folder}"), f"run.dir: {folder} holds files but is no run's folder"
        )
        assert snapshot(tmp_path) == before


def test_a_file_in_place_of_the_run_folder(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(real("train", config, f"run.dir={tmp_path / 'file'}"), "run.dir: ", "no run's folder")
    assert (tmp_path / "file").read_text() == "mine"


def write_nothing_as_root() -> None:
    """Root may write where permissions say no; without these capabilities it may not, as everybody else."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # of the effective ones CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


@pytest.mark.parametrize("existing", [True, False])
def test_a_run_folder_that_cannot_be_written(tmp_path: Path, tiny_data: Path, existing: bool) -> None:
    above = tmp_path / "read-only"
    (above / "run").mkdir(parents=True) if existing else above.mkdir()
    folders = [path for path in (above / "run", above) if path.exists()]
    for folder in folders:
        folder.chmod(0o555)
    ran = train(tmp_path, tiny_data, f"run.dir={above / 'run'}", fault=write_nothing_as_root)
    for folder in folders:
        folder.chmod(0o755)
    assert_refused(ran, f"run.dir: {above / 'run'} cannot be written", "Permission denied")


def test_a_validation_set_of_another_tokenizer(config: Path, other_shards: Path) -> None:
    ran = real("train", config, f"data.validation={other_shards / 'train'}")
    assert_refused(ran, "data.validation", "another tokenizer", "--tokenizer")


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the same text with a tokenizer of their own."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.py").write_text("".join(f"value_{n} = {n * n} + other[{n}]\n" for n in range(600)))
    options = Options(vocab_size=300, validation=0.0, tokens_per_chunk=64)
    prepare([folder / "text.py"], folder / "shards", options, processes=1, say=lambda _: None)
    return folder / "shards"


# -- a resume that would be another training -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("model.num_layers=3", "model.num_layers: this run was started with 2, now it is 3"),
        ("model.dropout=0.2", "model.dropout: this run was started with 0.1, now it is 0.2"),
        ("run.seed=2", "run.seed: this run was started with 1, now it is 2"),
        ("data.seq_length=16", "data.seq_length: this run was started with 32, now it is 16"),
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate: this run was started with 0.01"),
        ("schedule.total=11 steps", "schedule.total: this run was started with"),
        ("objective.loss_across_documents=true", "objective.loss_across_documents"),
        ("precision.compute=bf16", "precision.compute: this run was started with 'fp32'"),
    ],
)
def test_a_resume_with_what_may_not_change(run: Path, change: str, field: str) -> None:
    before = snapshot(run)
    assert_refused(real("train", run, change), field, "run.dir")
    assert snapshot(run) == before


def test_a_resume_with_other_data(run: Path, tmp_path: Path, other_shards: Path) -> None:
    """Wherever the shards lie now, they are known by their hashes; nothing is written before they are."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = snapshot(copy)
    data = f"data={{train: {other_shards / 'train'}, validation: {other_shards / 'train'}, seq_length: 32}}"
    ran = command("train", copy, data, "schedule.total=20 steps")
    assert_refused(ran, "was trained on other data", str(other_shards), "run.dir")
    assert snapshot(copy) == before


def test_moved_data_is_the_same_data(run: Path, tmp_path: Path, tiny_data: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    moved = Path(shutil.copytree(tiny_data, tmp_path / "moved"))
    options = (f"data.train={moved / 'train'}", f"data.validation={moved / 'validation'}", "schedule.total=13 steps")
    ran = command("train", copy, *options)
    assert ran.code == 0 and "going on after step 12" in ran.out, ran.told


# -- during training -------------------------------------------------------------------------------------------------


def spoil_shard(step: int, path: str, how: str) -> None:
    """Before the count-th step the shard is cut to its first chunk, or all but that is altered."""
    from parallel.replicated import PlainEngine

    def spoil(*_: object) -> None:
        first = 9 * 1024  # a header of 512 bytes, 4,097 ids of 2 bytes, padding
        if how == "cut":
            os.truncate(path, first)
            return
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            file.seek(first)
            file.write(bytes(size - first))

    running._on_call(PlainEngine, "step", step, spoil)


@pytest.mark.parametrize("how", ["cut", "altered"])
def test_a_shard_that_is_spoiled_during_training(tmp_path: Path, tiny_data: Path, how: str) -> None:
    """Read chunk by chunk (one lane): the run stops where it comes to a chunk that is not what it was. When the shard is
    put back it goes on, and ends as the run whose shards were left alone."""
    shards = Path(shutil.copytree(tiny_data, tmp_path / "shards"))
    shard = shards / "train" / "shard-00000.tar"
    options = ("data.lanes=1", "data.window=1", "schedule.total=40 steps", "monitor.validate_every=null")
    ran = train(tmp_path, shards, *options, fault=partial(spoil_shard, 4, str(shard), how))
    assert_refused(ran, str(shard), "chunk ", "Restore the file")
    steps = running.steps_of(tmp_path / "run")
    assert steps and steps[-1] >= 3
    shutil.copy(tiny_data / "train" / "shard-00000.tar", shard)
    again = command("train", tmp_path / "run")
    assert again.code == 0 and f"going on after step {steps[-1]}" in again.out, again.told
    assert train(tmp_path / "whole", shards, *options).code == 0
    running.assert_same_run(tmp_path / "whole" / "run", tmp_path / "run")


def test_a_shard_that_is_spoiled_before(config: Path, tmp_path: Path, tiny_data: Path) -> None:
    shards = Path(shutil.copytree(tiny_data, tmp_path / "shards"))
    os.truncate(shards / "train" / "shard-00000.tar", 4000)
    ran = real("train", config, f"data.train={shards / 'train'}")
    assert_refused(ran, "shard-00000.tar", "cut short")
    assert not (tmp_path / "run").exists()


# -- commands that use a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate", "evaluate", "inspect", "tensorboard", "train"])
def test_a_folder_that_is_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        arguments = ["--data", str(tmp_path)] if name == "evaluate" else []
        without_torch = name in ("inspect", "tensorboard", "train")
        ran = (real if without_torch and folder.exists() else command)(name, folder, *arguments)
        assert_refused(ran, str(folder))


def test_a_run_without_a_checkpoint(tmp_path: Path, run: Path) -> None:
    for name in ("config.yaml", "tokenizer.model"):
        shutil.copy(run / name, tmp_path / name)
    for arguments in (("generate", tmp_path), ("evaluate", tmp_path, "--data", tmp_path)):
        assert_refused(command(*arguments), "no checkpoint yet", f"python -m pretrain train {tmp_path}")


def test_a_checkpoint_step_that_does_not_exist(run: Path) -> None:
    for arguments in (("generate", run), ("evaluate", run, "--data", run)):
        assert_refused(command(*arguments, "--checkpoint", "5"), "--checkpoint 5", "[3, 4, 6, 8, 9, 12]")


@pytest.mark.parametrize("stride", ["0", "-1", "33"])
def test_a_stride_out_of_range(run: Path, stride: str) -> None:
    ran = command("evaluate", run, "--data", run / "config.yaml", "--stride", stride)
    assert_refused(ran, f"--stride {stride}: give 1 to 32")


def test_a_batch_size_of_none(run: Path) -> None:
    ran = command("evaluate", run, "--data", run / "config.yaml", "--batch-size", "0")
    assert_refused(ran, "--batch-size 0: give at least 1")


def test_options_of_generate_out_of_range_are_told_together(run: Path) -> None:
    wrong = ["--top-p", "1.5", "--temperature", "-1", "--top-k", "-2", "--max-tokens", "0"]
    assert_refused(command("generate", run, *wrong), "--top-p 1.5", "--temperature -1", "--top-k -2", "--max-tokens")
    assert_refused(command("generate", run, "--top-p", "0"), "--top-p 0", "above 0 and at most 1")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00text"], ids=["empty", "blank", "binary"])
def test_evaluation_of_a_file_with_nothing_to_score(run: Path, tmp_path: Path, content: bytes) -> None:
    """The message speaks of options that this command has."""
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    ran = command("evaluate", run, "--data", path)
    assert_refused(ran, f"--data {path}: ", "nothing to score" if not content.strip() else "not all of it is text")
    assert "--strict" not in ran.err


def test_evaluation_of_what_is_not_there_or_of_another_tokenizer(run: Path, tmp_path: Path, other_shards: Path) -> None:
    assert_refused(command("evaluate", run, "--data", tmp_path / "none"), str(tmp_path / "none"))
    assert_refused(command("evaluate", run, "--data", other_shards / "train"), "--data", "another tokenizer")
    (tmp_path / "empty").mkdir()
    assert_refused(command("evaluate", run, "--data", tmp_path / "empty"), str(tmp_path / "empty"))


def test_evaluation_of_the_folder_above_the_shards(run: Path, tiny_data: Path) -> None:
    """Not of its JSON files as text, which it could be taken for."""
    assert_refused(command("evaluate", run, "--data", tiny_data), "--data", str(tiny_data / "validation"))


def test_inspection_of_samples(run: Path, tiny_data: Path) -> None:
    assert_refused(real("inspect", run, "--sample", "0"), "--sample", "shards")
    assert_refused(real("inspect", tiny_data / "train", "--sample", "-1"), "--sample -1")
    assert_refused(real("inspect", tiny_data), str(tiny_data / "train"), str(tiny_data / "validation"))


def test_a_tokenizer_of_the_run_that_was_spoiled(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "tokenizer.model").write_bytes(b"nothing")
    assert_refused(command("generate", copy), "tokenizer.model", "not a SentencePiece model")
