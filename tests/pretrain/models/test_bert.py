"""BERT against transformers' model, in loss and gradients; and what holds for it under every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForPreTraining

from kernels import noise
from parallel.initial import initialise
from parallel.layers import Parts
from pretrain.config.model import ModelConfig, body_parameters, parameter_count, pooler_parameters
from pretrain.models.bert import BERT
from tests.pretrain.models.references import Named, assert_gradients_equal, gradients_of, load, weights_of

VOCAB, LENGTH, MASKED = 50, 12, 3
SMALL: dict[str, Any] = {
    "kind": "bert",
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 4,
    "ffn_hidden_size": 24,
    "norm_position": "post",
    "norm_epsilon": 1e-12,
    "initial_scale": 0.2,
}


def make_bert(config: ModelConfig, pairs: bool = True, **options: Any) -> BERT:
    """With biases and norms away from 0 and 1, so that none of them can be missing unseen."""
    model = BERT(config, Parts(), VOCAB, LENGTH, pairs=pairs, **options)
    initialise(model, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                count = VOCAB if name == "head.bias" else len(parameter)
                parameter[:count].add_(noise.normal(noise.key(1, name), (count,), (0,), (count,)), alpha=0.1)
    return model


def make_batch(rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    places = torch.stack([torch.randperm(LENGTH, generator=generator)[:MASKED].sort().values for _ in range(rows)])
    return {
        "inputs": torch.randint(VOCAB, (rows, LENGTH), generator=generator),
        "targets": torch.randint(VOCAB, (rows, MASKED), generator=generator),
        "mask": (torch.rand(rows, MASKED, generator=generator) < 0.7).float(),
        "sample_keys": noise.sample_keys(1, torch.arange(rows)),
        "segments": (torch.arange(LENGTH)[None] > torch.tensor([3, 5, 8])[:rows, None]).long(),
        "places": places,
        "labels": torch.tensor([0, 1, 1])[:rows],
        "labelled": torch.tensor([1.0, 1.0, 0.0])[:rows],
    }


def make_transformers(config: ModelConfig) -> BertForPreTraining:
    theirs = BertConfig(
        vocab_size=VOCAB,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.feed_forward_size,
        max_position_embeddings=LENGTH,
        layer_norm_eps=config.norm_epsilon,
        hidden_dropout_prob=0.0,
        pad_token_id=None,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return BertForPreTraining(theirs)


def as_transformers(ours: Named) -> Named:
    body = "bert.embeddings"
    theirs = {
        f"{body}.word_embeddings.weight": ours["embedding.weight"],
        f"{body}.position_embeddings.weight": ours["positions"],
        f"{body}.token_type_embeddings.weight": ours["segments"],
        "cls.predictions.bias": ours["head.bias"],
    }
    for kind in ("weight", "bias"):
        theirs[f"{body}.LayerNorm.{kind}"] = ours[f"embedding_norm.{kind}"]
        theirs[f"bert.pooler.dense.{kind}"] = ours[f"pooler.dense.{kind}"]
        theirs[f"cls.seq_relationship.{kind}"] = ours[f"pair_head.{kind}"]
        theirs[f"cls.predictions.transform.dense.{kind}"] = ours[f"transform.dense.{kind}"]
        theirs[f"cls.predictions.transform.LayerNorm.{kind}"] = ours[f"transform.norm.{kind}"]
        for i in range(2):
            block, to = f"blocks.{i}", f"bert.encoder.layer.{i}"
            for name, part in {"query": "q", "key": "k", "value": "v"}.items():
                theirs[f"{to}.attention.self.{name}.{kind}"] = ours[f"{block}.attention.{part}.{kind}"]
            theirs[f"{to}.attention.output.dense.{kind}"] = ours[f"{block}.attention.out.{kind}"]
            theirs[f"{to}.attention.output.LayerNorm.{kind}"] = ours[f"{block}.norm_1.{kind}"]
            theirs[f"{to}.intermediate.dense.{kind}"] = ours[f"{block}.feed_forward.up.{kind}"]
            theirs[f"{to}.output.dense.{kind}"] = ours[f"{block}.feed_forward.down.{kind}"]
            theirs[f"{to}.output.LayerNorm.{kind}"] = ours[f"{block}.norm_2.{kind}"]
    return theirs


def expected_sums(theirs: BertForPreTraining, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of both losses and numbers of right predictions, by transformers' logits at all positions."""
    found = theirs(batch["inputs"], token_type_ids=batch["segments"])
    logits = found.prediction_logits.gather(1, batch["places"][..., None].expand(-1, -1, VOCAB))
    losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    pair_losses = F.cross_entropy(found.seq_relationship_logits, batch["labels"], reduction="none")
    right = (logits.argmax(-1) == batch["targets"]) * batch["mask"]
    pairs_right = (found.seq_relationship_logits.argmax(-1) == batch["labels"]) * batch["labelled"]
    masked = (losses * batch["mask"].flatten()).sum()
    return masked, (pair_losses * batch["labelled"]).sum(), right.sum(), pairs_right.sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_it_is_transformers_bert_for_pretraining(dtype: torch.dtype, tolerance: float) -> None:
    config = ModelConfig(**SMALL)
    ours, theirs = make_bert(config).to(dtype), make_transformers(config).to(dtype)
    load(theirs, as_transformers(weights_of(ours)))
    batch = make_batch()
    sums, wanted = ours(**batch), expected_sums(theirs, batch)
    assert sums.shape == (2,)
    torch.testing.assert_close(sums, torch.stack(wanted[:2]).to(sums.dtype), rtol=tolerance, atol=tolerance)
    weights = torch.tensor([0.3, 1.7])
    (sums * weights).sum().backward()
    (wanted[0] * weights[0] + wanted[1] * weights[1]).backward()
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert_gradients_equal(as_transformers(gradients_of(ours)), named, tolerance)
    judged = ours.eval()(**batch)
    torch.testing.assert_close(
        judged, torch.stack([part.float() for part in wanted]).to(judged.dtype), rtol=1e-5, atol=1e-5
    )


def test_a_position_sees_those_after_it_and_padding_no_one_else() -> None:
    model, batch = make_bert(ModelConfig(**SMALL)), make_batch()
    documents = (torch.arange(LENGTH)[None] >= 9).int().expand(3, -1)
    batch["places"] = torch.tensor([[0, 1, 2]] * 3)
    before = model(**batch, documents=documents)
    for place, same in ((11, True), (8, False)):
        inputs = batch["inputs"].clone()
        inputs[:, place] = (inputs[:, place] + 1) % VOCAB
        assert torch.equal(model(**{**batch, "inputs": inputs}, documents=documents), before) == same


@pytest.mark.parametrize("option", [{}, {"norm_position": "pre"}, {"tie_embeddings": False}, {"positions": "rope"}])
@pytest.mark.parametrize("pairs", [True, False])
def test_stages_one_after_the_other_are_the_whole_model(option: dict[str, Any], pairs: bool) -> None:
    config = ModelConfig(**{**SMALL, "dropout": 0.2, **option})
    whole = make_bert(config, pairs)
    cut = {"layers": range(1), "last": False}, {"layers": range(1, 2), "first": False}
    first, second = (make_bert(config, pairs, **stage) for stage in cut)
    batch = make_batch()
    hidden = first(**batch)
    assert hidden.shape == (3, LENGTH, 16)
    assert torch.equal(second(**batch, hidden=hidden), whole(**batch))
    together = {**weights_of(first), **weights_of(second)}
    assert set(together) == set(weights_of(whole))
    held = sum(tensor.numel() for tensor in weights_of(whole).values())
    assert held == parameter_count(config, VOCAB, LENGTH, pairs)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: Any) -> None:
    config, batch = ModelConfig(**SMALL, dropout=0.2), make_batch()
    plain, again = make_bert(config), make_bert(config, recompute=recompute)
    for model in (plain, again):
        model(**batch).sum().backward()
    found, wanted = gradients_of(again), gradients_of(plain)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_label_smoothing_is_for_training_alone() -> None:
    batch = make_batch()
    plain, smoothed = (make_bert(ModelConfig(**SMALL), label_smoothing=share) for share in (0.0, 0.1))
    assert plain(**batch)[0] != smoothed(**batch)[0] and plain(**batch)[1] == smoothed(**batch)[1]
    assert torch.equal(plain.eval()(**batch), smoothed.eval()(**batch))


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "counted"),
    [(12, 768, 12, 109_482_240), (24, 1024, 16, 335_141_888)],
)
def test_base_and_large_have_the_published_number_of_parameters(
    layers: int, hidden: int, heads: int, counted: int
) -> None:
    """ "110M" and "340M" (Devlin et al. 2018, section 3), which are the uncased models with their pooler."""
    config = ModelConfig(kind="bert", num_layers=layers, hidden_size=hidden, num_heads=heads, norm_position="post")
    assert body_parameters(config, 30_522, 512) + pooler_parameters(config) == counted
