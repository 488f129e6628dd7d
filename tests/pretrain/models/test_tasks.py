"""The tasks' models against transformers', in outputs, loss and gradients; and decoders, which transformers heads otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from kernels import noise
from parallel.initial import initialise
from parallel.layers import Parts
from pretrain.config.model import ModelConfig
from pretrain.models.tasks import NOWHERE, TaskModel
from tests.pretrain.models import test_bert
from tests.pretrain.models.references import Named, assert_gradients_equal, gradients_of, load, weights_of

VOCAB, LENGTH = test_bert.VOCAB, 8
BERT = ModelConfig(**test_bert.SMALL)
CLASSES = {
    "classification": ("BertForSequenceClassification", "classifier", 3),
    "regression": ("BertForSequenceClassification", "classifier", 1),
    "multiple-choice": ("BertForMultipleChoice", "classifier", 1),
    "tagging": ("BertForTokenClassification", "classifier", 5),
    "question-answering": ("BertForQuestionAnswering", "qa_outputs", 2),
}


def make(kind: str, config: ModelConfig = BERT, **options: Any) -> TaskModel:
    rows = 3 if kind == "multiple-choice" else 1
    model = TaskModel(config, Parts(), VOCAB, LENGTH, kind, CLASSES[kind][2], rows, **options)
    initialise(model, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                count = len(parameter)
                parameter.add_(noise.normal(noise.key(1, name), (count,), (0,), (count,)), alpha=0.1)
    return model


def make_batch(kind: str) -> dict[str, Tensor]:
    """Four examples of 8, 5, 3 and 6 tokens; of multiple choice with 3, 3, 2 and 3 choices."""
    generator = torch.Generator().manual_seed(3)
    rows = 3 if kind == "multiple-choice" else 1
    lengths = torch.tensor([8, 5, 3, 6]).repeat_interleave(rows)
    if rows > 1:
        lengths[8] = 0  # a choice that there is not
    padding = (torch.arange(LENGTH)[None] >= lengths[:, None]).int()
    ids = torch.randint(1, VOCAB, (4 * rows, LENGTH), generator=generator) * (1 - padding)
    targets, mask = torch.tensor([[2], [0], [1], [2]]), torch.tensor([[1.0], [1.0], [0.0], [1.0]])
    if kind == "regression":
        targets = torch.tensor([[0.5], [-1.0], [3.0], [0.1]])
    if kind == "multiple-choice":
        targets = torch.tensor([[2], [0], [1], [1]])
    if kind == "tagging":
        targets = torch.randint(5, (4, LENGTH), generator=generator)
        mask = (1.0 - padding.float()) * (torch.arange(LENGTH) % 2)
    if kind == "question-answering":
        targets = torch.tensor([[2, 5], [0, 0], [1, 2], [3, 3]])
    return {
        "inputs": ids,
        "targets": targets,
        "mask": mask,
        "sample_keys": noise.sample_keys(1, torch.arange(4 * rows)),
        "documents": padding,
        "segments": (torch.arange(LENGTH)[None] >= 3).long().expand(4 * rows, -1) * (1 - padding),
        "places": torch.zeros(4 * rows, 1, dtype=torch.int64),
    }


def make_transformers(kind: str) -> nn.Module:
    name, _, count = CLASSES[kind]
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
        num_labels=count,
        attn_implementation="eager",
    )
    return getattr(transformers, name)(config)  # type: ignore[no-any-return]


def as_transformers(kind: str, ours: Named) -> Named:
    """The body's names are those of the pre-training model, whose heads are left out."""
    heads = {
        "head.bias",
        *(
            f"{name}.{part}"
            for name in ("pair_head", "transform.dense", "transform.norm")
            for part in ("weight", "bias")
        ),
    }
    missing = {
        name: torch.zeros(1) for name in (*heads, "pooler.dense.weight", "pooler.dense.bias") if name not in ours
    }
    theirs = test_bert.as_transformers({**missing, **ours})
    kept = {name: value for name, value in theirs.items() if not name.startswith("cls.")}
    if "pooler.dense.weight" not in ours:
        kept = {name: value for name, value in kept.items() if "pooler" not in name}
    return kept | {f"{CLASSES[kind][1]}.{part}": ours[f"task_head.{part}"] for part in ("weight", "bias")}


def expected(kind: str, theirs: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs as ours are shaped, and the summed loss, by transformers' logits."""
    ids, attends, segments = batch["inputs"], 1 - batch["documents"], batch["segments"]
    arguments = {"attention_mask": attends, "token_type_ids": segments}
    if kind == "multiple-choice":
        logits = theirs(ids.view(4, 3, -1), **{name: value.view(4, 3, -1) for name, value in arguments.items()}).logits
        logits = torch.where(attends.view(4, 3, -1)[..., 0] > 0, logits, NOWHERE)
        losses = F.cross_entropy(logits, batch["targets"][:, 0], reduction="none")
        return logits[..., None], (losses * batch["mask"][:, 0]).sum()
    found = theirs(ids, **arguments)
    if kind == "question-answering":
        logits = torch.stack((found.start_logits, found.end_logits), dim=-1)
        logits = torch.where(attends[..., None] > 0, logits, NOWHERE)
        ends = [F.cross_entropy(logits[..., end], batch["targets"][:, end], reduction="none") for end in (0, 1)]
        return logits, ((ends[0] + ends[1]) / 2 * batch["mask"][:, 0]).sum()
    logits = found.logits
    if kind == "tagging":
        losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        return logits, (losses * batch["mask"].flatten()).sum()
    losses = (
        (logits[:, 0] - batch["targets"][:, 0]).square()
        if kind == "regression"
        else F.cross_entropy(logits, batch["targets"][:, 0], reduction="none")
    )
    return logits[:, None], (losses * batch["mask"][:, 0]).sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", CLASSES)
def test_it_is_transformers_model(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs, batch = make(kind).to(dtype), make_transformers(kind).to(dtype), make_batch(kind)
    if kind == "regression":
        batch["targets"] = batch["targets"].to(dtype)
    load(theirs, as_transformers(kind, weights_of(ours)))
    outputs, loss = expected(kind, theirs, batch)
    found = ours(**batch)
    assert found.shape == (1,)
    torch.testing.assert_close(found[0], loss, rtol=tolerance, atol=tolerance)
    found.sum().backward()
    loss.backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # The last bias shifts every place of an answer alike: its true gradient is zero, what there is is rounding.
    assert_gradients_equal(as_transformers(kind, gradients_of(ours)), wanted, 5 * tolerance)
    judged, real = ours.eval()(**batch), (1 - batch["documents"]).bool()
    if kind in ("tagging", "question-answering"):
        judged, outputs = judged[real], outputs[real]
    torch.testing.assert_close(judged, outputs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", CLASSES)
def test_padding_changes_nothing(kind: str) -> None:
    """Other ids, and more of it."""
    model, batch = make(kind).eval(), make_batch(kind)
    outputs = model(**batch)
    noisy = torch.where(batch["documents"] > 0, 7, batch["inputs"])
    real = (1 - batch["documents"]).bool()
    other = model(**{**batch, "inputs": noisy})
    if kind in ("tagging", "question-answering"):
        outputs, other = outputs[real], other[real]
    assert torch.equal(outputs, other)


def test_a_decoder_reads_the_last_token() -> None:
    config = ModelConfig(num_layers=2, hidden_size=16, num_heads=4, initial_scale=0.2)
    model, batch = make("classification", config).eval(), make_batch("classification")
    assert not hasattr(model, "pooler")
    batch["segments"] = torch.zeros_like(batch["segments"])
    batch["places"] = torch.tensor([[7], [4], [2], [5]])
    states = model.states(batch["inputs"], LENGTH, None, batch["documents"])
    wanted = model.task_head(states[torch.arange(4), batch["places"][:, 0]])
    torch.testing.assert_close(model(**batch)[:, 0], wanted)
    changed = batch["inputs"].clone()
    changed[:, 0] = 3
    assert not torch.allclose(model(**{**batch, "inputs": changed}), model(**batch)), "it has seen the first"


@pytest.mark.parametrize("kind", CLASSES)
def test_stages_one_after_the_other_are_the_whole_model(kind: str) -> None:
    config = BERT.model_copy(update={"dropout": 0.2})
    whole, batch = make(kind, config), make_batch(kind)
    first, second = make(kind, config, layers=range(1), last=False), make(kind, config, layers=range(1, 2), first=False)
    assert torch.equal(second(**batch, hidden=first(**batch)), whole(**batch))
    assert set(weights_of(first)) | set(weights_of(second)) == set(weights_of(whole))


def test_dropout_is_of_training_alone_and_depends_on_the_sample() -> None:
    model, batch = make("classification", BERT.model_copy(update={"dropout": 0.3})), make_batch("classification")
    assert torch.equal(model(**batch), model(**batch))
    other = {**batch, "sample_keys": noise.sample_keys(2, torch.arange(4))}
    assert model(**batch) != model(**other)
    assert torch.equal(model.eval()(**batch), model(**other))
