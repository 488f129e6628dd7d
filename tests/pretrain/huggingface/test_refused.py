"""What cannot be exported or imported: one message with the option or the tensor, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.errors import UserError
from pretrain.huggingface.export import export
from pretrain.huggingface.importing import import_folder
from pretrain.huggingface.vocabulary import Use, write_tokenizer
from pretrain.tokenization.base import Tokenizer
from tests.pretrain import running
from tests.pretrain.huggingface.models import BERT, GPT2, LENGTH, LLAMA, NEOX, edit_config, make_theirs, write_run


def quiet(_: str) -> None:
    pass


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "nearest", "words"),
    [
        ({**GPT2, "norm_position": "post"}, "gpt2", ["model.norm_position: 'post'"]),
        ({**GPT2, "positions": "sinusoidal"}, "gpt2", ["model.positions: 'sinusoidal'"]),
        ({**GPT2, "positions": "alibi"}, "gpt2", ["model.positions: 'alibi'"]),
        ({**GPT2, "num_kv_heads": 2}, "gpt2", ["model.num_kv_heads: 2 (it can be num_heads, 4)"]),
        ({**GPT2, "head_size": 8}, "gpt2", ["model.head_size: 8"]),
        ({**GPT2, "attention_window": 4}, "gpt2", ["model.attention_window: 4"]),
        ({**GPT2, "biases": False}, "gpt2", ["model.biases: False"]),
        ({**LLAMA, "attention_window": [4, None]}, "llama", ["model.attention_window: [4, None, 4]"]),
        ({**LLAMA, "attention_window": 4, "biases": True}, "llama", ["model.attention_window: 4"]),
        ({**LLAMA, "norm": "layer"}, "llama", ["model.norm: 'layer'"]),
        ({**NEOX, "embedding_dropout": 0.1}, "gpt_neox", ["model.embedding_dropout: 0.1"]),
        ({**GPT2, "activation": "swiglu", "norm": "rms"}, "llama", ["model.positions: 'learned'"]),
    ],
)
def test_an_option_that_no_architecture_has_is_named(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], nearest: str, words: list[str]
) -> None:
    write_run(tmp_path / "run", options, tokenizer)
    with pytest.raises(UserError, match="no architecture of Hugging Face's can have all of") as error:
        export(tmp_path / "run", tmp_path / "out", say=quiet)
    line = next(line for line in str(error.value).splitlines() if line.startswith(f"  {nearest} has no "))
    assert all(word in line for word in words) and line.count("model.") == len(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({**BERT, "norm_position": "pre"}, "model.norm_position: 'pre'"),
        ({**BERT, "positions": "rope"}, "model.positions: 'rope'"),
        ({**BERT, "embedding_norm": False}, "model.embedding_norm: False"),
    ],
)
def test_an_option_that_berts_have_not_is_named(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], word: str
) -> None:
    write_run(tmp_path / "run", options, tokenizer, "bert")
    with pytest.raises(UserError, match="no architecture of Hugging Face's can have all of") as error:
        export(tmp_path / "run", tmp_path / "out", say=quiet)
    [line] = str(error.value).splitlines()[1:]
    assert line.startswith("  bert has no ") and word in line


def test_what_training_alone_uses_is_left_out_with_a_word(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_run(tmp_path / "run", {**LLAMA, "dropout": 0.25, "embedding_dropout": 0.0}, tokenizer)
    ran = running.command("export", tmp_path / "run", "--out", tmp_path / "out")
    assert ran.code == 0 and "note: model.residual_dropout 0.25 is left out" in ran.out
    assert "embedding_dropout" not in ran.out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_dropout"] == 0.25


def test_a_folder_in_use_is_not_written_into(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_run(tmp_path / "run", GPT2, tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    ran = running.command("export", tmp_path / "run", "--out", tmp_path / "out")
    assert ran.code == 2 and "exists and is not an empty folder" in ran.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


# -- import ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("theirs")
    for name in ("gpt2", "llama", "mistral", "neox", "bert"):
        make_theirs(name).save_pretrained(home / name)
        write_tokenizer(home / name, tokenizer, Use(LENGTH))
    return {path.name: path for path in home.iterdir()}


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def refusal(folder: Path) -> str:
    run = folder.parent / "run"
    with pytest.raises(UserError) as error:
        import_folder(folder, run, say=quiet)
    assert not run.exists() and list(folder.parent.glob(".run*")) == []
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True (it can be False)"),
        ("gpt2", {"activation_function": "silu"}, "activation_function: 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias: True (it can be what mlp_bias is, False)"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type: 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "cannot be understood: KeyError('factor')"),
        ("llama", {"rope_scaling": "yes"}, "config.json"),
        ("neox", {"use_parallel_residual": True}, "use_parallel_residual: True (it can be False)"),
        ("neox", {"rotary_pct": 0.25}, "rotary_pct: 0.25 (it can be 1.0)"),
        ("llama", {"model_type": "mamba"}, "model_type is 'mamba'; those that can be imported are gpt2, llama"),
        ("llama", {"model_type": ["llama"]}, "model_type is ['llama']"),
        ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "of gpt2 GPT2LMHeadModel, GPT2Model, GPT2ForSequence"),
        (
            "gpt2",
            {"architectures": ["GPT2Model", "GPT2LMHeadModel"]},
            "architectures is ['GPT2Model', 'GPT2LMHeadModel']",
        ),
        ("gpt2", {"architectures": [["GPT2Model"]]}, "architectures is [['GPT2Model']]"),
        ("bert", {"architectures": ["BertModel"]}, "holds cls.predictions.bias, which this model has no place for"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "a tag can be O, B-type or I-type"),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}, "lacks the tensor qa_outputs.weight"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder: True (it can be False)"),
        ("gpt2", {"n_head": 5}, "model.hidden_size: 24 is not a multiple of num_heads 5"),
        ("gpt2", {"n_layer": "3"}, "model.num_layers"),
        ("gpt2", {"n_layer": -1}, "model.num_layers"),
        ("gpt2", {"layer_norm_epsilon": 0.0}, "model.norm_epsilon"),
        ("gpt2", {"n_layer": 4}, "lacks the tensor transformer.h.3.ln_1.weight"),
        ("gpt2", {"n_layer": 2}, "holds transformer.h.2.attn.c_attn.bias, which this model has no place for"),
        ("gpt2", {"n_embd": 28, "n_inner": 96}, "transformer.wte.weight is (340, 24), but by config.json (340, 28)"),
        ("llama", {"vocab_size": 339}, "model.embed_tokens.weight is (340, 24), but by config.json (339, 24)"),
        ("llama", {"vocab_size": 329}, "vocab_size is 329, but the tokenizer has 330 ids"),
        ("llama", {"vocab_size": None}, "vocab_size is None, but the tokenizer has 330 ids"),
        ("mistral", {"sliding_window": 0}, "model.attention_window: 0 shows no tokens"),
    ],
)
def test_a_config_that_is_not_ours_or_of_other_weights_is_named(
    tmp_path: Path, made: dict[str, Path], name: str, changes: dict[str, Any], words: str
) -> None:
    folder = copy(made[name], tmp_path / "theirs")
    edit_config(folder, **changes)
    assert words in refusal(folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04" * 100)


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def whole_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int32)
    save_file(weights, folder / "model.safetensors")


def index_of(folder: Path, places: Any) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled": (pickled, "only in pytorch_model.bin, a format that can run code when it is read"),
    "no weights": (no_weights, "holds no weights: neither model.safetensors nor model.safetensors.index.json"),
    "no safetensors": (no_safetensors, "model.safetensors: is no safetensors file"),
    "cut short": (cut_short, "model.safetensors: is no safetensors file"),
    "whole numbers": (whole_numbers, "model.norm.weight holds torch.int32, not floating-point numbers"),
    "a path in the index": (lambda f: index_of(f, {"a": "../a.safetensors"}), "is no name of a file in the folder"),
    "a hidden one": (lambda f: index_of(f, {"a": ".a.safetensors"}), "is no name of a file in the folder"),
    "no name in the index": (lambda f: index_of(f, {"a": 5}), "is no name of a file in the folder"),
    "a file that is missing": (lambda f: index_of(f, {"a": "b.safetensors"}), "b.safetensors is missing"),
    "a tensor that is missing": (lambda f: index_of(f, {"a": "a.safetensors"}), "a.safetensors: lacks a, which"),
    "no index": (lambda f: index_of(f, []), "has no weight_map"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in it"),
    "no JSON": (lambda f: (f / "config.json").write_text("{") and None, "config.json is not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]") and None, "config.json is no JSON object"),
    "no tokenizer": (no_tokenizer, "holds no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_is_not_whole_is_one_message(tmp_path: Path, made: dict[str, Path], damage: str) -> None:
    folder = copy(made["llama"], tmp_path / "theirs")
    harm, words = DAMAGE[damage]
    harm(folder)
    assert words in refusal(folder)


def test_the_commands_exit_with_2_and_one_message(tmp_path: Path, made: dict[str, Path]) -> None:
    folder = copy(made["llama"], tmp_path / "theirs")
    pickled(folder)
    ran = running.command("import", folder, "--out", tmp_path / "run")
    running.assert_refused(ran, "pytorch_model.bin", "save_pretrained")
    ran = running.command("export", tmp_path / "none", "--out", tmp_path / "out")
    running.assert_refused(ran, "no config.yaml in it")


def test_an_imported_run_is_told_evaluated_and_continued_in_text(tmp_path: Path, made: dict[str, Path]) -> None:
    ran = running.command("import", made["llama"], "--out", tmp_path / "run")
    assert ran.code == 0 and "gpt of 3 layers, 24 wide" in ran.out, ran.told
    (tmp_path / "t.txt").write_text("the quick brown fox")
    for arguments in (["inspect", tmp_path / "run"], ["evaluate", tmp_path / "run", "--data", tmp_path / "t.txt"],
                      ["generate", tmp_path / "run", "--prompt", "the", "--max-tokens", "4"]):  # fmt: skip
        ran = running.command(*arguments)
        assert ran.code == 0, ran.told
