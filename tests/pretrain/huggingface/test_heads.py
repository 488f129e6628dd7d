"""Fine-tuned models go to transformers' classes for their tasks and come from them: outputs, labels, predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from pretrain.checkpoint import read_weight, weight_shapes
from pretrain.config.load import load_config
from pretrain.errors import UserError
from pretrain.huggingface.export import export
from pretrain.huggingface.importing import import_folder
from pretrain.huggingface.vocabulary import Use, write_tokenizer
from pretrain.loading import find_checkpoint, load_model
from pretrain.tokenization.base import Tokenizer
from tests.pretrain import running
from tests.pretrain.huggingface.models import (
    BERT,
    COMMON,
    GPT2,
    GPT2_SIZES,
    LENGTH,
    LLAMA,
    LLAMA_SIZES,
    NEOX,
    edit_config,
    random_weights,
    some_ids,
    some_segments,
    write_run,
)

WINDOW: dict[str, Any] = {**LLAMA, "attention_window": 5}
LABELS: dict[str, tuple[str, ...]] = {
    "classification": ("so so", "9", "tr\u00e8s bon"),
    "regression": (),
    "multiple-choice": ("0", "1", "2"),
    "tagging": ("B-x y", "I-x y", "O"),
    "question-answering": (),
}
# our options, the task, and theirs: the class, and its heads' tensors
OURS: list[tuple[dict[str, Any], str, str]] = [
    (BERT, "classification", "BertForSequenceClassification"),
    (BERT, "regression", "BertForSequenceClassification"),
    (BERT, "multiple-choice", "BertForMultipleChoice"),
    (BERT, "tagging", "BertForTokenClassification"),
    (BERT, "question-answering", "BertForQuestionAnswering"),
    (GPT2, "classification", "GPT2ForSequenceClassification"),
    (GPT2, "regression", "GPT2ForSequenceClassification"),
    (GPT2, "tagging", "GPT2ForTokenClassification"),
    (GPT2, "question-answering", "GPT2ForQuestionAnswering"),
    (LLAMA, "classification", "LlamaForSequenceClassification"),
    (LLAMA, "tagging", "LlamaForTokenClassification"),
    (WINDOW, "classification", "MistralForSequenceClassification"),
    (NEOX, "classification", "GPTNeoXForSequenceClassification"),
    (NEOX, "tagging", "GPTNeoXForTokenClassification"),
    (NEOX, "question-answering", "GPTNeoXForQuestionAnswering"),
]
PAD = 3


def quiet(_: str) -> None:
    pass


def task_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, **({"overlap": 8} if kind in ("tagging", "question-answering") else {})}


def theirs_of(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    reader = getattr(transformers, config.architectures[0])
    model, told = reader.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), told
    return model.eval()


@torch.no_grad()
def outputs_of(model: Any, kind: str) -> Tensor:
    """Of ours, (N, places, C): two texts, the second with padding; of multiple choice one with three choices."""
    rows = 3 if kind == "multiple-choice" else 2
    ids, segments = some_ids(320, LENGTH * 2).view(-1, LENGTH)[:rows] + 4, some_segments()[[0, 1, 0]][:rows]
    lengths = torch.tensor([LENGTH, 17, 20])[:rows]
    padding = torch.arange(LENGTH) >= lengths[:, None]
    places = lengths[:, None] - 1 if model.config.causal else torch.zeros(rows, 1, dtype=torch.int64)
    nothing = torch.zeros(rows, 1)
    ids = torch.where(padding, 0, ids)
    found = model(ids, nothing.long(), nothing, None, padding.int(), segments, places)
    return found.masked_fill(padding[..., None], 0.0) if found.shape[1] == LENGTH else found


@torch.no_grad()
def outputs_of_theirs(model: Any, kind: str) -> Tensor:
    rows = 3 if kind == "multiple-choice" else 2
    ids, segments = some_ids(320, LENGTH * 2).view(-1, LENGTH)[:rows] + 4, some_segments()[[0, 1, 0]][:rows]
    held = torch.arange(LENGTH) < torch.tensor([LENGTH, 17, 20])[:rows, None]
    given = {"input_ids": torch.where(held, ids, PAD), "attention_mask": held.long()}
    if model.config.model_type == "bert":
        given["token_type_ids"] = segments
    if kind == "multiple-choice":
        return model(**{name: value[None] for name, value in given.items()}).logits[..., None]
    found = model(**given)
    if kind == "question-answering":
        return torch.stack((found.start_logits, found.end_logits), dim=2).masked_fill(~held[..., None], 0.0)
    return found.logits.masked_fill(~held[..., None], 0.0) if kind == "tagging" else found.logits[:, None]


def assert_same_outputs(ours: Any, theirs: Any, kind: str) -> None:
    found, expected = outputs_of(ours, kind), outputs_of_theirs(theirs, kind)
    assert found.shape == expected.shape and (found != 0).any() and found.std() > 0.01
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize(("options", "kind", "class_name"), OURS, ids=[f"{name}-{kind}" for _, kind, name in OURS])
def test_a_fine_tuned_run_goes_with_its_outputs_and_labels_and_comes_back_bitwise(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], kind: str, class_name: str
) -> None:
    wide = {**options, "initial_scale": 0.2}  # so that outputs differ from text to text
    model = write_run(tmp_path / "run", wide, tokenizer, objective=task_of(kind), labels=LABELS[kind])
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    theirs = theirs_of(tmp_path / "out")
    assert type(theirs).__name__ == class_name
    assert_same_outputs(model, theirs, kind)
    wanted = {"classification": "single_label_classification", "regression": "regression"}.get(kind)
    assert theirs.config.problem_type == wanted
    if kind in ("classification", "tagging"):
        assert theirs.config.id2label == dict(enumerate(LABELS[kind]))
        assert theirs.config.label2id == {name: number for number, name in enumerate(LABELS[kind])}
    assert kind != "regression" or theirs.config.num_labels == 1
    import_folder(tmp_path / "out", tmp_path / "again", say=quiet)
    before, after = find_checkpoint(tmp_path / "run", None), find_checkpoint(tmp_path / "again", None)
    shapes = weight_shapes(before)
    assert weight_shapes(after) == shapes
    assert all(read_weight(before, name).equal(read_weight(after, name)) for name in shapes)
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == tokenizer.content
    assert json.loads((tmp_path / "again" / "labels.json").read_text()) == {"labels": list(LABELS[kind])}
    assert load_config(tmp_path / "again" / "config.yaml").objective.kind == kind
    assert outputs_of(load_model(tmp_path / "again").model, kind).equal(outputs_of(model, kind))


@pytest.mark.parametrize(
    ("options", "targets"),
    [(BERT, ["q", "k", "out", "up"]), (LLAMA, ["v", "gate", "down"]), (GPT2, ["q", "up", "down"])],
)
def test_loras_factors_are_merged_into_what_is_exported(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], targets: list[str]
) -> None:
    """transformers' model gives the run's outputs, and does not without the factors."""
    lora = {"rank": 3, "alpha": 12.0, "targets": targets, "dropout": 0.1}
    task = {"objective": task_of("classification"), "labels": LABELS["classification"]}
    model = write_run(tmp_path / "run", {**options, "lora": lora, "initial_scale": 0.2}, tokenizer, **task)
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    theirs = theirs_of(tmp_path / "out")
    assert_same_outputs(model, theirs, "classification")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.zero_()
    with pytest.raises(AssertionError):
        assert_same_outputs(model, theirs, "classification")


BERT_SIZES = {**LLAMA_SIZES, "layer_norm_eps": 1e-5}
THEIRS: list[tuple[str, str, dict[str, Any]]] = [
    ("BertForSequenceClassification", "classification", {**BERT_SIZES, "num_labels": 4}),
    ("BertForSequenceClassification", "regression", {**BERT_SIZES, "num_labels": 1}),
    ("BertForTokenClassification", "tagging", {**BERT_SIZES, "id2label": {0: "O", 1: "B-a", 2: "I-a"}}),
    ("BertForQuestionAnswering", "question-answering", BERT_SIZES),
    ("BertForMultipleChoice", "multiple-choice", {**BERT_SIZES, "num_labels": 3}),
    ("GPT2ForSequenceClassification", "classification", {**GPT2_SIZES, "pad_token_id": PAD, "num_labels": 3}),
]


@pytest.mark.parametrize(("class_name", "kind", "options"), THEIRS, ids=[f"{name}-{kind}" for name, kind, _ in THEIRS])
def test_a_fine_tuned_folder_becomes_a_run_that_predicts(
    tmp_path: Path, tokenizer: Tokenizer, class_name: str, kind: str, options: dict[str, Any]
) -> None:
    made = getattr(transformers, class_name)
    theirs = random_weights(made(made.config_class(**{**COMMON, **options})), 4)
    theirs.save_pretrained(tmp_path / "theirs")
    write_tokenizer(tmp_path / "theirs", tokenizer, Use(LENGTH - 4))
    config = import_folder(tmp_path / "theirs", tmp_path / "run", say=quiet)
    assert config.objective.kind == kind and config.data.seq_length == LENGTH - 4
    loaded = load_model(tmp_path / "run")
    assert loaded.task is not None
    assert_same_outputs(loaded.model, theirs, kind)
    if kind == "classification":
        assert loaded.task.labels.names == tuple(f"LABEL_{number}" for number in range(options["num_labels"]))


def test_a_planted_fault_in_a_head_is_seen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A head whose outputs stand in another order."""
    from safetensors.torch import load_file, save_file

    model = write_run(tmp_path / "run", BERT, tokenizer, objective=task_of("tagging"), labels=LABELS["tagging"])
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    weights["classifier.weight"] = weights["classifier.weight"].flip(0).contiguous()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(AssertionError):
        assert_same_outputs(model, theirs_of(tmp_path / "out"), "tagging")


def test_an_older_taggers_pooler_is_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """It is in files of the time when every class had one; the class has none now."""
    from safetensors.torch import load_file, save_file

    write_run(tmp_path / "run", BERT, tokenizer, objective=task_of("tagging"), labels=LABELS["tagging"])
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    path = tmp_path / "out" / "model.safetensors"
    extra = {"bert.pooler.dense.weight": torch.ones(24, 24), "bert.pooler.dense.bias": torch.ones(24)}
    save_file({**load_file(path), **extra}, path, {"format": "pt"})
    import_folder(tmp_path / "out", tmp_path / "again", say=quiet)
    assert load_model(tmp_path / "again").model.task_head.weight.shape == (3, 24)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (GPT2, "multiple-choice", "objective.kind: 'multiple-choice' (transformers has no class of gpt2 for it)"),
        (
            LLAMA,
            "question-answering",
            "objective.kind: 'question-answering' (transformers has no class of llama for it)",
        ),
    ],
)
def test_a_task_without_a_class_of_theirs_is_named(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], kind: str, words: str
) -> None:
    write_run(tmp_path / "run", options, tokenizer, objective=task_of(kind), labels=LABELS[kind])
    ran = running.command("export", tmp_path / "run", "--out", tmp_path / "out")
    running.assert_refused(ran, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "classification",
            {"problem_type": "multi_label_classification"},
            "problem_type: 'multi_label_classification'",
        ),
        ("classification", {"problem_type": "regression"}, "regression has one number"),
        ("classification", {"id2label": {"0": "a", "1": "a", "2": "b"}}, "it can name each class once"),
        ("classification", {"id2label": {"0": "a", "1": " ", "2": "b"}}, "it can name each class once"),
        ("classification", {"id2label": {"0": "a", "2": "b"}}, "cannot be understood: KeyError('1')"),
        (
            "classification",
            {"id2label": {"0": "a", "1": "b"}},
            "classifier.weight is (3, 24), but by config.json (2, 24)",
        ),
        ("tagging", {"id2label": {"0": "O", "1": "NOUN", "2": "B-a"}}, "id2label: 'NOUN' (a tag can be O, B-type or"),
        ("classification", {"architectures": ["BertForNextSentencePrediction"]}, "BertForSequenceClassification"),
    ],
)
def test_labels_that_are_none_of_ours_are_named(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, changes: dict[str, Any], words: str
) -> None:
    write_run(tmp_path / "run", BERT, tokenizer, objective=task_of(kind), labels=LABELS[kind])
    export(tmp_path / "run", tmp_path / "out", say=quiet)
    edit_config(tmp_path / "out", **changes)
    with pytest.raises(UserError) as error:
        import_folder(tmp_path / "out", tmp_path / "again", say=quiet)
    assert words in str(error.value) and not (tmp_path / "again").exists()


def test_what_config_json_cannot_have_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = {**task_of("question-answering"), "version_2": True, "answer_length": 12}
    write_run(tmp_path / "run", GPT2, tokenizer, objective=task)
    told = export(tmp_path / "run", tmp_path / "out", say=quiet).notes
    left = ["version_2 True", "answer_length 12", "overlap 8"]
    assert told == [f"objective.{what} is left out: config.json has no place for it" for what in left]
