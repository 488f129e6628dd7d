from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.errors import UserError
from tests.pretrain import running
from tests.pretrain.data.selection.making import page, selection
from tests.pretrain.finetuning import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A tiny classifier, trained for three epochs."""
    folder = tmp_path_factory.mktemp("classifier")
    config = tiny.write_config(folder, "classification", tiny.bert(tiny_data))
    ran = running.command("train", config, "schedule.total=3 epochs", "monitor.validate_every=3 epochs", timeout=120)
    assert ran.code == 0, ran.told
    return folder / "run"


def test_probabilities_are_those_of_predict_and_decide(run: Path, tmp_path: Path) -> None:
    texts = ["path return value", "import error file class", "file class " + page(1, 2000), "return"]
    (tmp_path / "texts.tsv").write_text("text\n" + "\n".join(" ".join(text.split()) for text in texts) + "\n")
    texts = [" ".join(text.split()) for text in texts]
    ran = running.command("predict", run, "--input", tmp_path / "texts.tsv", "--out", tmp_path / "out.jsonl")
    assert ran.code == 0, ran.told
    lines = [json.loads(line)["scores"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    label = next(iter(lines[0]))
    scores = sorted(line[label] for line in lines)
    least = (scores[1] + scores[2]) / 2
    assert scores[2] - scores[1] > 2e-4, "two on each side"
    quality = {"run": str(run), "label": label, "least": least}
    chosen = selection(quality=quality)
    verdicts = chosen.judge([*texts, ""])[:4]
    assert [verdict.text is not None for verdict in verdicts] == [line[label] >= least for line in lines]
    reasons = {(verdict.reason, verdict.detail.startswith(f"probability of {label} 0.")) for verdict in verdicts}
    assert reasons == {("", False), ("quality", True)}
    assert [verdict.bins.tolist() for verdict in verdicts] == [[int(line[label] * 48)] for line in lines]
    alone = [selection(quality={**quality, "batch_size": 1}).judge([text])[0] for text in texts]
    assert [verdict.text for verdict in alone] == [verdict.text for verdict in verdicts]
    rules = selection(quality=quality, length={"min_words": 2})
    assert [verdict.reason for verdict in rules.judge(texts)][3] == "words", "who is dropped before is not asked"


def test_what_is_no_classifier_is_told(run: Path, tmp_path: Path, tiny_data: Path) -> None:
    for path, label, told in [
        (tmp_path / "none", "good", "there is no folder"),
        (run, "good", "has no label 'good'; its labels are "),
        (tiny.bert(tiny_data), "good", "was trained for masked, not classification"),
    ]:
        with pytest.raises(UserError, match=told):
            selection(quality={"run": str(path), "label": label})
