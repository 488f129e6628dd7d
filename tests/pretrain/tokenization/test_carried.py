"""Shards and runs carry a tokenizer of any kind, and every command loads it from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.loading import load_model
from pretrain.tokenization.foreign import load_tokenizer
from tests.pretrain import running
from tests.pretrain.data.corpus import quietly, stdlib_texts, write_texts
from tests.pretrain.tokenization.samples import WRITERS


@pytest.fixture(scope="module", params=["uncased", "byte-level"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face's files."""
    return WRITERS[request.param](tmp_path_factory.mktemp("foreign") / request.param)


@pytest.fixture(scope="module")
def shards(foreign: Path) -> Path:
    texts = write_texts(foreign.parent / "texts", stdlib_texts())
    ran = running.command("prepare", texts, "--tokenizer", foreign, "--out", foreign.parent / "shards",
                          "--validation", "0.3", "--tokens-per-chunk", "4096")  # fmt: skip
    assert ran.code == 0, ran.told
    return foreign.parent / "shards"


@pytest.fixture(scope="module")
def run(shards: Path) -> Path:
    ran = running.train(shards.parent, shards)
    assert ran.code == 0, ran.told
    return shards.parent / "run"


def test_shards_and_run_hold_one_file_of_the_tokenizer(foreign: Path, shards: Path, run: Path) -> None:
    content = load_tokenizer(foreign).content
    for folder in (shards / "train", shards / "validation", run):
        assert (folder / "tokenizer.json").read_bytes() == content
        assert not (folder / "tokenizer.model").exists()
    manifest = json.loads((shards / "train" / "manifest.json").read_bytes())
    assert manifest["tokenizer"]["file"] == "tokenizer.json" and manifest["version"] == 4


def test_several_processes_encode_as_one(foreign: Path, shards: Path) -> None:
    quietly(
        [shards.parent / "texts"], shards.parent / "again", 2, tokenizer=foreign, validation=0.3, tokens_per_chunk=4096
    )
    manifests = [(folder / "train" / "manifest.json").read_bytes() for folder in (shards, shards.parent / "again")]
    assert manifests[0] == manifests[1]


def test_every_command_reads_the_runs_tokenizer(foreign: Path, shards: Path, run: Path) -> None:
    loaded, ours = load_model(run), load_tokenizer(foreign)
    assert loaded.tokenizer.sha256 == ours.sha256
    text = shards.parent / "text.txt"
    text.write_text("def main():\n    return 1\n")
    scored = json.loads(running.command("evaluate", run, "--data", text).out)
    assert scored["tokens"] == len(ours.encode(text.read_text())) + 1
    assert json.loads(running.command("evaluate", run, "--data", shards / "validation").out)["tokens"] > 100
    for arguments in (["generate", run, "--prompt", "def", "--max-tokens", "5"], ["inspect", run],
                      ["inspect", shards / "train", "--sample", "3"]):  # fmt: skip
        ran = running.command(*arguments)
        assert ran.code == 0 and ran.out.strip(), ran.told


def test_a_run_goes_on_with_its_tokenizer(shards: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    ran = running.train(tmp_path, shards, 'schedule.total="13 steps"')
    assert ran.code == 0 and "going on after step 12" in ran.out, ran.told


def test_a_run_that_begins_anew_with_another_tokenizer_keeps_no_other(
    shards: Path, tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_data / "train" / "tokenizer.model", tmp_path / "run")
    ran = running.train(tmp_path, shards)
    assert ran.code == 0, ran.told
    assert [path.name for path in (tmp_path / "run").glob("tokenizer.*")] == ["tokenizer.json"]


def test_data_of_another_tokenizer_is_refused(run: Path, tiny_data: Path) -> None:
    ran = running.command("evaluate", run, "--data", tiny_data / "train")
    assert ran.code == 2 and "another tokenizer" in ran.err
