"""Models go to Hugging Face's transformers and come from it with the same logits, and there and back bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from parallel.layers import Parts
from parallel.logical import logical_tensors, view
from pretrain.checkpoint import load_weights, read_weight, weight_shapes
from pretrain.config.load import load_config
from pretrain.huggingface import tensors
from pretrain.huggingface.architecture import settings_of
from pretrain.huggingface.export import export
from pretrain.huggingface.importing import import_folder
from pretrain.huggingface.vocabulary import Use, write_tokenizer
from pretrain.loading import find_checkpoint, load_model
from pretrain.merging import Merged
from pretrain.models.make import make_model
from pretrain.models.stack import Stack
from pretrain.sizes import Sizes
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.huggingface.models import (
    LENGTH,
    OURS,
    THEIRS,
    logits_of,
    logits_of_theirs,
    make_theirs,
    random_weights,
    some_ids,
    some_segments,
    write_run,
)


def quiet(_: str) -> None:
    pass


def theirs_of(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    reader = getattr(transformers, config.architectures[0])
    model, told = reader.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), told
    return model.eval()


def assert_same_logits(ours: Any, theirs: Any, vocab_size: int) -> None:
    ids = some_ids(vocab_size)
    found, wanted = logits_of(ours, ids), logits_of_theirs(theirs, ids)
    assert found[0].shape == (2, LENGTH, vocab_size)
    for logits, expected in zip(found, wanted, strict=True):
        assert logits.shape == expected.shape and expected.std() > 0.01
        assert (logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


# -- ours to theirs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_an_exported_run_has_our_logits_in_transformers(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    options, class_name = OURS[name]
    model = write_run(tmp_path / "run", options, tokenizer, name)
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    theirs = theirs_of(tmp_path / "out")
    assert type(theirs).__name__ == class_name
    assert_same_logits(model, theirs, options.get("vocab_size") or tokenizer.vocab_size)


@pytest.mark.parametrize("name", OURS)
def test_there_and_back_is_bitwise(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    """Weights, tokenizer and every option that takes effect, but for the unsaid ones and ntk, which is another base."""
    write_run(tmp_path / "run", OURS[name][0], tokenizer, name)
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    import_folder(tmp_path / "out", tmp_path / "again", say=quiet)
    before, after = find_checkpoint(tmp_path / "run", None), find_checkpoint(tmp_path / "again", None)
    shapes = weight_shapes(before)
    assert weight_shapes(after) == shapes and after.state.step == 0
    for tensor in shapes:
        assert read_weight(before, tensor).equal(read_weight(after, tensor)), tensor
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == tokenizer.content
    configs = [load_config(tmp_path / run / "config.yaml") for run in ("run", "again")]
    settings = [settings_of(config.model, 1, max(size for _, size in config.lengths)) for config in configs]
    pairs = [config.objective.pairs.replace("order", "next") for config in configs]  # which theirs does not tell apart
    assert pairs[0] == pairs[1] and configs[0].objective.kind == configs[1].objective.kind
    unsaid = {"dropout", "scale_initial_by_depth", *(("rope_base", "rope_scaling") if "ntk" in name else ())}
    if name == "llama ntk":
        assert settings[1]["rope_scaling"] is None and settings[1]["rope_base"] > settings[0]["rope_base"]
    assert {k: v for k, v in settings[0].items() if k not in unsaid} == {
        k: v for k, v in settings[1].items() if k not in unsaid
    }


def test_a_planted_fault_in_a_map_is_seen(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    """Keys and values exchanged: same shapes, other logits."""
    from pretrain.huggingface import architectures
    from pretrain.huggingface.gpt2 import GPT2

    def exchanged(row: Any) -> Any:
        return row if len(row.ours) == 1 else type(row)(row.theirs, (row.ours[0], *row.ours[:0:-1]), row.form)

    wrong = type(GPT2)(**{**vars(GPT2), "rows": tuple(map(exchanged, GPT2.rows))})
    monkeypatch.setattr(architectures, "KNOWN", (wrong,))
    model = write_run(tmp_path / "run", OURS["gpt2"][0], tokenizer)
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    with pytest.raises(AssertionError):
        assert_same_logits(model, theirs_of(tmp_path / "out"), tokenizer.vocab_size)


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_can_be_rounded(tmp_path: Path, tokenizer: Tokenizer, dtype: str, stored: torch.dtype) -> None:
    write_run(tmp_path / "run", OURS["llama"][0], tokenizer)
    export(tmp_path / "run", tmp_path / "out", dtype, say=quiet)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        found = file.get_tensor("model.norm.weight")
    expected = read_weight(find_checkpoint(tmp_path / "run", None), "norm.weight").to(stored)
    assert found.dtype == stored and found.equal(expected)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").torch_dtype == stored


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_large_models_are_several_files_with_an_index(
    tmp_path: Path, tokenizer: Tokenizer, name: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tensors, "FILE_BYTES", 20_000)
    model = write_run(tmp_path / "run", OURS[name][0], tokenizer)
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_logits(model, theirs_of(tmp_path / "out"), tokenizer.vocab_size)
    import_folder(tmp_path / "out", tmp_path / "again", say=quiet)
    assert len(list((tmp_path / "again").rglob("rank-*.safetensors"))) > 3
    assert load_model(tmp_path / "again").model.logits(some_ids(330)).equal(model.logits(some_ids(330)))


def test_memory_is_bounded_by_one_tensor(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    """No more than the parts of one tensor of theirs are read before it is written."""
    write_run(tmp_path / "run", OURS["gpt2"][0], tokenizer)
    events: list[str] = []
    read, pieces = Merged.read, tensors._pieces

    def counted(found: Merged, name: str) -> torch.Tensor:
        events.append(name)
        return read(found, name)

    def watched(header: bytes, part: Any, dtype: torch.dtype) -> Any:
        for piece in pieces(header, part, dtype):
            events.append("written")
            yield piece

    monkeypatch.setattr(Merged, "read", counted)
    monkeypatch.setattr(tensors, "_pieces", watched)
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    runs = " ".join(events).split("written")
    assert max(len(run.split()) for run in runs) == 3 and len(runs) > 30  # query, key and value


# -- theirs to ours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THEIRS)
def test_an_imported_folder_has_their_logits(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs", tokenizer, Use(LENGTH))
    import_folder(tmp_path / "theirs", tmp_path / "run", say=quiet)
    loaded = load_model(tmp_path / "run")
    assert loaded.step == 0 and loaded.tokenizer.content == tokenizer.content
    assert_same_logits(loaded.model, theirs, 340)


@pytest.mark.parametrize("name", ["gpt2", "llama tied"])
def test_a_folder_of_the_body_alone_is_read(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    """Its tensors have no prefix; GPT-2's first checkpoints are such, with buffers of the attention's mask."""
    theirs = make_theirs(name)
    body = theirs.transformer if name == "gpt2" else theirs.model
    if name == "gpt2":
        body.h[0].attn.register_buffer("masked_bias", torch.tensor(-1e4))
    body.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs", tokenizer, Use(LENGTH))
    import_folder(tmp_path / "theirs", tmp_path / "run", say=quiet)
    assert_same_logits(load_model(tmp_path / "run").model, theirs, 340)


@pytest.mark.parametrize("pooler", [True, False])
def test_a_berts_body_comes_without_heads_and_goes_as_one(tmp_path: Path, tokenizer: Tokenizer, pooler: bool) -> None:
    """As sentence encoders are stored; an old file also holds its positions' numbers, and names norms as TensorFlow did."""
    from safetensors.torch import load_file, save_file

    theirs = random_weights(transformers.BertModel(make_theirs("bert").config, add_pooling_layer=pooler), 5)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file({**weights, "embeddings.position_ids": torch.arange(LENGTH)[None]}, path, {"format": "pt"})
    write_tokenizer(tmp_path / "theirs", tokenizer, Use(LENGTH))
    config = import_folder(tmp_path / "theirs", tmp_path / "run", say=quiet)
    found = find_checkpoint(tmp_path / "run", 0)
    assert ("pooler.dense.weight" in weight_shapes(found)) is pooler
    model, ids = Stack(config.model, Parts(), 340, LENGTH).eval(), some_ids(340)
    with torch.no_grad():
        for name, piece, parameter in logical_tensors(model):
            view(parameter, piece).copy_(read_weight(found, name))
        states = model.states(ids, LENGTH, segments=some_segments())
        expected = theirs(ids, token_type_ids=some_segments()).last_hidden_state
    assert (states - expected).abs().max() <= 1e-5
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    again = transformers.BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=pooler).eval()
    assert all(parameter.equal(again.get_parameter(name)) for name, parameter in theirs.named_parameters())


def test_a_half_precision_folder_is_read_to_the_same_numbers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_theirs("llama").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs", tokenizer, Use(LENGTH))
    import_folder(tmp_path / "theirs", tmp_path / "run", say=quiet)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", torch_dtype=torch.float32)
    assert_same_logits(load_model(tmp_path / "run").model, theirs.eval(), 340)


def test_weights_of_an_imported_run_load_into_a_model_of_its_options(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As fine-tuning does."""
    make_theirs("llama").save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs", tokenizer, Use(LENGTH))
    config = import_folder(tmp_path / "theirs", tmp_path / "run", say=quiet)
    model = make_model(config, Parts(), Sizes(340)).eval()
    load_weights(find_checkpoint(tmp_path / "run", 0), model)
    assert model.logits(some_ids(340)).equal(load_model(tmp_path / "run").model.logits(some_ids(340)))


def test_another_tokenizer_can_be_brought(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_theirs("llama").save_pretrained(tmp_path / "theirs")
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    import_folder(tmp_path / "theirs", tmp_path / "run", tmp_path / "t.model", say=quiet)
    assert load_model(tmp_path / "run").tokenizer.content == tokenizer.content
