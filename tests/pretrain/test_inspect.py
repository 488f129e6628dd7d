"""`inspect` tells what a run or a folder of shards holds, and sees damage."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pretrain.__main__ import main
from pretrain.tokenization.foreign import load_tokenizer
from tests.pretrain import running


@pytest.fixture(scope="module")
def run(tiny_data: Path) -> Path:
    return running.trained(tiny_data)


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    code = main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_a_run_is_told_with_its_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = inspect(capsys, run)
    assert code == 0
    weights = [value for name, value in running.tensors_of(run, 12).items() if "exp_avg" not in name]
    assert f"gpt, {sum(value.numel() for value in weights):,} parameters, fp32" in told
    lines = running.lines_of(run)
    last = [line["loss"] for line in lines if "loss" in line][-1]
    assert f"step 12, loss {last:.4f}" in told
    losses = {line["step"]: f"{line['validation_loss']:.4f}" for line in lines if "validation_loss" in line}
    rows = {int(found[1]): found[0] for found in re.finditer(r"^│ (\d+) +│.*$", told, re.MULTILINE)}
    assert sorted(rows) == [3, 4, 6, 8, 9, 12]
    for step, row in rows.items():
        assert "1 match" in row and "1 process, zero 0" in row
        assert losses.get(step, "MiB") in row


def test_a_damaged_checkpoint_is_named_and_the_others_still_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    [tensors] = running.checkpoint_folder(copy, 9).glob("*.safetensors")
    os.truncate(tensors, 1000)
    (running.checkpoint_folder(copy, 4) / "manifest.json").write_text("[]")
    code, told = inspect(capsys, copy)
    assert code == 1
    assert told.count("1 match") == 4 and told.count("damaged │") == 2
    lines = told.splitlines()
    assert any(line.startswith("step 9: ") and "1,000 bytes, the manifest says" in line for line in lines)
    assert any(line.startswith("step 4: ") and "step-00000004/manifest.json: damaged" in line for line in lines)


def test_a_run_without_a_step_is_no_fault(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.yaml", "tokenizer.model"):
        shutil.copy(run / name, tmp_path / name)
    code, told = inspect(capsys, tmp_path)
    assert code == 0 and "no step logged yet" in told


def test_a_run_whose_steps_were_skipped_is_told(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their losses are null in the metrics."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "loss": null, "grad_norm": null}\n{"step": 12, "validation_loss": null}\n')
    code, told = inspect(capsys, copy)
    assert code == 0 and "step 12, loss" in told


def test_shards_are_told_as_their_manifest_counts_them(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((tiny_data / "train" / "manifest.json").read_text())
    code, told = inspect(capsys, tiny_data / "train")
    assert code == 0
    for name in ("documents", "tokens", "text_bytes", "vocab_size"):
        assert f"{manifest[name]:,}" in told
    assert "eos 2" in told and "uint16" in told


@pytest.mark.parametrize("number", [0, 7, 5000])
def test_a_sample_is_where_it_says_and_reads_as_it_does(
    tiny_data: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """The tokens at the named place of the named tar file, by tarfile and the tokenizer alone."""
    code, told = inspect(capsys, tiny_data / "train", "--sample", str(number), "--seq-length", "32", "--seed", "1")
    assert code == 0
    place = re.match(rf"sample {number} of seed 1: epoch (\d+), (\S+), chunk (\d+), token ([\d,]+)\n", told)
    assert place is not None, told
    manifest = json.loads((tiny_data / "train" / "manifest.json").read_text())
    assert int(place[1]) == number // ((manifest["tokens"] - 1) // 32)
    with tarfile.open(tiny_data / "train" / place[2]) as tar:
        member = tar.extractfile(f"{int(place[3]):08d}.tok")
        assert member is not None
        first = int(place[4].replace(",", ""))
        ids = np.frombuffer(member.read(), "<u2")[first : first + 32].tolist()
    tokenizer = load_tokenizer(tiny_data / "train" / "tokenizer.model")
    shown = re.split(r"^--- document \d+ of \d+\n", told, flags=re.MULTILINE)[1:]
    assert [text.removesuffix("\n") for text in shown] == [
        tokenizer.decode(part) for part in _split(ids, tokenizer.eos)
    ]


def _split(ids: list[int], eos: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for index in ids:
        parts[-1].append(index)
        if index == eos:
            parts.append([])
    return [part for part in parts if part]
