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
    place = re.match(
        rf"sample {number} of seed 1: epoch (\d+), source (\S+), (\S+), chunk (\d+), token ([\d,]+)\n", told
    )
    assert place is not None and place[2] == str(tiny_data / "train"), told
    manifest = json.loads((tiny_data / "train" / "manifest.json").read_text())
    assert int(place[1]) == number // ((manifest["tokens"] - 1) // 32)
    with tarfile.open(tiny_data / "train" / place[3]) as tar:
        member = tar.extractfile(f"{int(place[4]):08d}.tok")
        assert member is not None
        first = int(place[5].replace(",", ""))
        ids = np.frombuffer(member.read(), "<u2")[first : first + 32].tolist()
    tokenizer = load_tokenizer(tiny_data / "train" / "tokenizer.model")
    shown = re.split(r"^--- document \d+ of \d+: tokens \d+ to \d+\n", told, flags=re.MULTILINE)[1:]
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


# -- data --------------------------------------------------------------------------------------------------------------


def test_counts_of_shards_as_json_are_those_of_the_text(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = inspect(capsys, tiny_data / "train", "--json")
    assert code == 0
    found = json.loads(told)
    manifest = json.loads((tiny_data / "train" / "manifest.json").read_text())
    assert found["counted_all"] and found["counted_documents"] == found["documents"] == manifest["documents"]
    assert found["tokens_per_byte"] * found["bytes_per_token"] == pytest.approx(1)
    assert sum(one[2] for one in found["document_tokens"]["histogram"]) == manifest["documents"]
    assert found["document_tokens"]["mean"] * manifest["documents"] == pytest.approx(manifest["tokens"])
    shares = [one["share"] for one in found["most_frequent"]]
    assert shares == sorted(shares, reverse=True) and len(shares) == 20
    assert found["padding_share"] == 0 and 0 < found["byte_share"] < 0.1


def test_lengths_are_drawn_as_a_histogram(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, told = inspect(capsys, tiny_data / "train")
    rows = re.findall(r"^ +([\d,]+) to +([\d,]+) +(\d+) +([\d.]+)%  (█*)$", told, re.MULTILINE)
    assert rows and max(len(row[4]) for row in rows) == 40
    fullest = max(rows, key=lambda row: int(row[2]))
    assert len(fullest[4]) == 40 and "exact duplicates" in told and "all tokens" in told


def write_config(folder: Path, train: str) -> Path:
    path = folder / "mixed.yaml"
    path.write_text(
        "version: 1\n"
        "model: {kind: gpt, num_layers: 1, hidden_size: 32, num_heads: 2, num_kv_heads: 2, ffn_hidden_size: 64}\n"
        f"data: {{train: {train}, weights: [3, 1], seq_length: 32, lanes: 8, seed: 5}}\n"
        "batch: {size: 8, micro_size: 8}\n"
        "schedule: {total: 100 steps, warmup: 5 steps}\n"
        "monitor: {validate_every: null}\n"
        "objective: {attention_across_documents: false}\n"
    )
    return path


def test_a_configs_sources_are_told_with_their_shares_of_the_run(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(tiny_data / part) for part in ("train", "validation")]
    path = write_config(tmp_path, json.dumps(folders))
    code, told = inspect(capsys, path, "--json")
    assert code == 0
    found = json.loads(told)
    assert [one["folder"] for one in found["shares"]] == [one["folder"] for one in found["sources"]] == folders
    assert [one["share"] for one in found["shares"]] == [0.75, 0.25]
    for one, share in zip(found["shares"], (0.75, 0.25), strict=True):
        assert one["run_tokens"] == pytest.approx(100 * 8 * 32 * share)
        assert one["epochs"] == pytest.approx(100 * 8 * share / ((one["tokens"] - 1) // 32))
    code, told = inspect(capsys, path)
    assert code == 0 and "75.00%" in told and told.count("exact duplicates") == 2


def test_a_sample_by_a_config_is_the_one_that_the_run_reads(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.data.stream import Stream

    folders = [str(tiny_data / part) for part in ("train", "validation")]
    path = write_config(tmp_path, json.dumps(folders))
    code, told = inspect(capsys, path, "--sample", "3", "--sample", "70", "--json")
    assert code == 0
    stream = Stream(folders, 32, 5, lanes=8, weights=[3, 1])
    for one, number in zip(json.loads(told), (3, 70), strict=True):
        assert one["number"] == number and one["source"] == stream.explain(number)["source"]
        assert one["rows"][0]["tokens"] == stream.read(np.array([number]))[0, :-1].tolist()
        assert one["rows"][0]["positions_begin_anew"]


def test_verification_names_what_is_wrong_and_ends_with_1(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = inspect(capsys, tiny_data / "train", "--verify")
    assert code == 0 and "are what was written" in told
    copy = Path(shutil.copytree(tiny_data / "train", tmp_path / "train"))
    shard = copy / "shard-00000.tar"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 4
    shard.write_bytes(data)
    code, told = inspect(capsys, copy, "--verify")
    assert code == 1 and f"{shard}, chunk 0: its bytes were altered" in told and "are what was written" not in told
    code, told = inspect(capsys, copy, "--verify", "--json")
    assert code == 1 and len(json.loads(told)["problems"]) == 2


WRONG = {
    "a seed beside a config": (["--config", "configs/gpt/demo.yaml", "--sample", "1", "--seed", "2"], "--seed"),
    "a seed without a sample": (["--seed", "2"], "--seed"),
    "a config without a sample": (["--config", "configs/gpt/demo.yaml"], "--config"),
    "a sample while all is read": (["--verify", "--sample", "1"], "--verify"),
    "a task's config": (["--config", "configs/finetune/classification.yaml", "--sample", "1"], "labelled examples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_do_not_go_together_are_refused(tiny_data: Path, case: str) -> None:
    from pretrain.__main__ import parse
    from pretrain.errors import UserError
    from pretrain.inspect import main as inspect_main

    options, word = WRONG[case]
    with pytest.raises(UserError, match=word):
        inspect_main(parse(["inspect", str(tiny_data / "train"), *options]))
