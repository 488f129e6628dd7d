"""Attention maps: transformers' own probabilities, those that training's attention multiplies by, images in TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from kernels.attention import alibi_slopes, attention
from pretrain.attention import CELL, GAP, Shown, as_image, attention_maps, probabilities, shown_layers
from pretrain.config.model import ModelConfig
from pretrain.config.run import Config
from tests.pretrain import running
from tests.pretrain.models.references import (
    GPT2_SHAPE,
    LLAMA_SHAPE,
    as_gpt2,
    as_llama,
    load,
    make_gpt,
    make_gpt2,
    make_llama,
    weights_of,
)
from tests.pretrain.models.test_bert import SMALL as BERT
from tests.pretrain.models.test_bert import as_transformers, make_bert, make_transformers

VOCAB, LENGTH = 40, 12
SMALL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 24,
    "initial_scale": 0.4,
}
IDS = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def sample(segments: Tensor | None = None) -> Shown:
    return Shown(IDS, None, segments, [str(index) for index in IDS[0].tolist()])


def assert_same_maps(found: dict[int, Tensor], theirs: Any) -> None:
    for layer, heads in found.items():
        assert heads.shape == (4, LENGTH, LENGTH) and heads.dtype == torch.float32
        torch.testing.assert_close(heads, theirs[layer][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(heads.sum(dim=-1), torch.ones(4, LENGTH))


# -- probabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoders_maps_are_transformers_attentions(name: str) -> None:
    shape = GPT2_SHAPE if name == "gpt2" else {**LLAMA_SHAPE, "num_kv_heads": 2}
    config = ModelConfig(**{**SMALL, **shape})
    ours = make_gpt(config, VOCAB, LENGTH).eval()
    theirs: Any = (make_gpt2 if name == "gpt2" else make_llama)(config, VOCAB, LENGTH).eval()
    load(theirs, (as_gpt2 if name == "gpt2" else as_llama)(weights_of(ours)))
    found = attention_maps(ours, sample(), [0, 2])
    assert list(found) == [0, 2] and not found[0].equal(found[2])
    assert_same_maps(found, theirs(IDS, output_attentions=True).attentions)
    assert all(heads.triu(1).count_nonzero() == 0 for heads in found.values()), "no query sees what is ahead"
    assert all(block.attention.parts is ours.parts for _, block in ours.layers()), "the model is as it was"


def test_an_encoders_maps_are_transformers_attentions() -> None:
    config = ModelConfig(**BERT)
    ours, theirs = make_bert(config).eval(), make_transformers(config).eval()
    load(theirs, as_transformers(weights_of(ours)))
    segments = (torch.arange(LENGTH)[None] > 5).long()
    found = attention_maps(ours, sample(segments), [0, 1])
    assert_same_maps(found, theirs(IDS, token_type_ids=segments, output_attentions=True).attentions)
    assert all(heads.triu(1).count_nonzero() > 0 for heads in found.values())


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": False},
        {"causal": True, "window": 3},
        {"causal": False, "window": 4, "slopes": alibi_slopes(4)},
        {"causal": True, "slopes": alibi_slopes(4), "documents": torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 2, 2, 2, 2]])},
        {"causal": False, "documents": torch.tensor([[0] * 9 + [1] * 3])},
    ],
)
def test_times_the_values_they_are_what_training_computes(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, LENGTH, heads, 8, generator=generator) for heads in (4, 2, 2))
    heads = probabilities(q, k, **options)
    found = torch.einsum("nst,tnd->snd", heads, v[0].repeat_interleave(2, dim=1))
    torch.testing.assert_close(found, attention(q, k, v, **options)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heads.sum(dim=-1), torch.ones(4, LENGTH))


# -- images ------------------------------------------------------------------------------------------------------------


def test_an_image_has_the_heads_side_by_side_rows_queries() -> None:
    heads = torch.zeros(3, 64, 64)
    heads[0, 1, 0], heads[1, 0, 2], heads[2, 63, 63] = 1.0, 0.25, 1.0
    image, side = as_image(heads), 64 * CELL + GAP
    assert image.shape == (2 * side - GAP, 2 * side - GAP) and image.dtype == np.uint8
    assert (image[CELL : 2 * CELL, :CELL] == 255).all(), "query 1 looks at key 0"
    assert (image[:CELL, side + 2 * CELL : side + 3 * CELL] == 128).all(), "a quarter is half as bright"
    assert (image[2 * side - GAP - CELL :, 64 * CELL - CELL : 64 * CELL] == 255).all()
    assert (image[64 * CELL : side] == 128).all() and (image[side:, side:] == 128).all(), "gaps, and no fourth head"
    assert image[: 64 * CELL, : 64 * CELL].sum() == 255 * CELL**2


@pytest.mark.parametrize(("layers", "wanted"), [(1, [0]), (4, [0, 1, 2, 3]), (12, [0, 4, 7, 11])])
def test_a_few_layers_from_the_first_to_the_last_are_shown(layers: int, wanted: list[int]) -> None:
    config = Config.model_validate({"model": {"num_layers": layers}})
    assert shown_layers(config) == wanted


# -- runs --------------------------------------------------------------------------------------------------------------


def images_of(run: Path) -> tuple[dict[str, dict[int, Any]], list[tuple[int, str]]]:
    """Decoded images by tag and step, and the texts beside them."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    found = {
        tag: {
            event.step: np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
            for event in events.Images(tag)
        }
        for tag in events.Tags()["images"]
    }
    tag = "tokens/attention/text_summary"
    texts = events.Tensors(tag) if tag in events.Tags()["tensors"] else []
    return found, [(event.step, event.tensor_proto.string_val[0].decode()) for event in texts]


WATCH = ("monitor.tensorboard=true", "schedule.total=4 steps", "monitor.attention_every=2 steps")


def test_a_run_draws_the_maps_of_its_prompt(tmp_path: Path, tiny_data: Path) -> None:
    extra = ("monitor.sample_prompt=import path", "monitor.attention_layers=[1]")
    ran = running.train(tmp_path, tiny_data, *WATCH, *extra)
    assert ran.code == 0 and "no effect" not in ran.out, ran.told
    images, texts = images_of(tmp_path / "run")
    assert set(images) == {"attention/layer_01"} and sorted(images["attention/layer_01"]) == [2, 4]
    image = images["attention/layer_01"][4]
    tokens = texts[0][1].split("|")
    count = sum(part.strip().startswith("`") for part in tokens)
    cell = 256 // count
    head = image[: count * cell : cell, : count * cell : cell].astype(float) / 255
    assert np.allclose((head**2).sum(axis=1), 1, atol=0.05) and (np.triu(head, 1) == 0).all()
    assert "import" in texts[0][1].replace("` | `", "").replace("`", "").replace("|", "").replace(" ", "")


def test_an_encoder_draws_its_first_held_out_sample_and_the_training_is_the_same(
    tmp_path: Path, tiny_data: Path
) -> None:
    bert = (
        "model={kind: bert, num_layers: 2, hidden_size: 32, num_heads: 4, norm_position: post, dropout: 0.1}",
        "objective={kind: masked, pairs: next}",
    )
    for name, watch in (("with", WATCH), ("without", WATCH[:2])):
        ran = running.train(tmp_path / name, tiny_data, *bert, *watch)
        assert ran.code == 0, ran.told
    images, texts = images_of(tmp_path / "with" / "run")
    assert set(images) == {"attention/layer_00", "attention/layer_01"}
    assert "`<mask>`" in texts[0][1] and "| `<cls>` |" in texts[0][1]
    assert running.numbers_of(tmp_path / "with" / "run") == running.numbers_of(tmp_path / "without" / "run")


def test_two_tensor_ranks_draw_the_heads_of_both(tmp_path: Path, tiny_data: Path) -> None:
    found = []
    for name, layout, world in (("one", "parallel.zero=0", 1), ("two", "parallel.tensor=2", 2)):
        ran = running.train(tmp_path / name, tiny_data, *WATCH, layout, world=world)
        assert ran.code == 0, ran.told
        found.append(images_of(tmp_path / name / "run")[0]["attention/layer_01"][4].astype(int))
    assert abs(found[0] - found[1]).max() <= 1


def test_where_no_process_has_all_layers_it_says_so(tmp_path: Path, tiny_data: Path) -> None:
    ran = running.train(tmp_path, tiny_data, *WATCH, "parallel.pipeline=2", world=2)
    assert ran.code == 0 and "monitor.attention_every has no effect under pp2" in ran.out, ran.told
    assert images_of(tmp_path / "run")[0] == {}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("monitor.attention_layers=[2]",), "monitor.attention_layers: [2]"),
        (("data.validation=null", "monitor.validate_every=null"), "monitor.attention_every: needs a sample"),
        (("monitor.tensorboard=false",), "monitor.attention_every: goes into TensorBoard"),
    ],
)
def test_what_has_no_effect_is_refused(overrides: tuple[str, ...], words: str, tmp_path: Path, tiny_data: Path) -> None:
    running.assert_refused(running.train(tmp_path, tiny_data, *WATCH, *overrides), words)
