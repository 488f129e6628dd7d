"""`evaluate` equals a brute-force computation with sliding windows, over text and over shards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.data.prepare import prepare
from pretrain.data.preparing.options import Options
from pretrain.evaluate import sum_loss
from pretrain.loading import Loaded, load_model
from tests.pretrain import running

TEXT = (
    2 * "def main(path):\n    with open(path) as file:\n        return file.read()\n\nclass Ünïcode:\n    '''doc'''\n"
)
STRIDES = (1, 5, 8, 31, 32)


@pytest.fixture(scope="module")
def run(tiny_data: Path) -> Path:
    return running.trained(tiny_data)


@pytest.fixture(scope="module")
def loaded(run: Path) -> Loaded:
    return load_model(run)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two documents, and a file that has none."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "__init__.py").touch()
    (folder / "a.py").write_text(TEXT)
    (folder / "b.txt").write_text("import os\n")
    return folder


def brute_force(loaded: Loaded, ids: list[int], stride: int) -> float:
    """Nats of ids[1:]: each token from the first window that reaches it, the windows beginning at 0, stride, ...; each
    by a forward pass of just its context, without padding or batches."""
    length, total = 32, 0.0
    for last in range(len(ids) - 1):
        window = 0 if last < length else -(-(last - length + 1) // stride)
        context = torch.tensor([ids[window * stride : last + 1]])
        assert 1 <= context.shape[1] <= length
        chances = loaded.model.logits(context)[0, -1].double().log_softmax(-1)
        total -= chances[ids[last + 1]].item()
    return total


def ids_of(loaded: Loaded, *texts: str) -> list[int]:
    eos = loaded.tokenizer.eos
    return [eos, *(index for text in texts for index in [*loaded.tokenizer.encode(text), eos])]


@pytest.mark.parametrize("stride", STRIDES)
def test_text_is_scored_as_by_brute_force(run: Path, loaded: Loaded, texts: Path, stride: int) -> None:
    """Through the command: one JSON line on stdout alone, nothing on stderr."""
    ran = running.command("evaluate", run, "--data", texts, "--stride", str(stride), "--batch-size", "3")
    assert ran.code == 0 and ran.err == "" and ran.out.count("\n") == 1, ran.told
    result = json.loads(ran.out)
    ids = ids_of(loaded, TEXT, "import os\n")
    assert len(ids) > 3 * 32, "several windows"
    nats, count, size = brute_force(loaded, ids, stride), len(ids) - 1, len((TEXT + "import os\n").encode())
    assert result["tokens"] == count and result["bytes"] == size
    assert result["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert result["stride"] == stride and result["step"] == 12


def test_shards_are_scored_as_their_text_is(
    run: Path, loaded: Loaded, texts: Path, tmp_path: Path, tiny_data: Path
) -> None:
    """Cut into chunks of 16 tokens: a window spans several, and no token is lost or counted twice where they meet."""
    options = Options(tokenizer=tiny_data / "train" / "tokenizer.model", validation=0.0, tokens_per_chunk=16)
    prepare([texts], tmp_path / "shards", options, processes=1, say=lambda _: None)
    results = [
        json.loads(running.command("evaluate", run, "--data", data, "--stride", "8").out)
        for data in (texts, tmp_path / "shards" / "train")
    ]
    assert results[0]["loss"] == pytest.approx(results[1].pop("loss"), rel=1e-6)
    assert results[0]["tokens"] == results[1]["tokens"] == len(ids_of(loaded, TEXT, "import os\n")) - 1
    assert results[0]["bytes"] == results[1]["bytes"]


@pytest.mark.parametrize("count", [2, 3, 32, 33, 34, 40, 64, 65])
def test_no_length_of_text_is_an_edge(loaded: Loaded, count: int) -> None:
    """Shorter than a window, just one, one and a token, ...; at any batch size."""
    ids = [(7 * place) % 512 for place in range(count)]
    for stride in (3, 32):
        expected = brute_force(loaded, ids, stride)
        for size in (1, 2, 100):
            total, scored = sum_loss(loaded.model, np.array(ids), stride, size)
            assert scored == count - 1
            assert total == pytest.approx(expected, rel=1e-6)


def test_an_earlier_checkpoint_can_be_asked_for(run: Path, texts: Path) -> None:
    results = [
        json.loads(running.command("evaluate", run, "--data", texts, "--checkpoint", str(step)).out) for step in (3, 12)
    ]
    assert [result["step"] for result in results] == [3, 12]
    assert results[0]["loss"] > results[1]["loss"]


def test_a_file_of_json_lines_is_scored_document_by_document(run: Path, loaded: Loaded, tmp_path: Path) -> None:
    documents = ["one\n", "two, and more"]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    result = json.loads(running.command("evaluate", run, "--data", path).out)
    assert result["tokens"] == len(ids_of(loaded, *documents)) - 1
    assert result["bytes"] == sum(map(len, documents))
