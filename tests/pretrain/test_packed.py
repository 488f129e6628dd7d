"""Rows of packed documents through real stages, objectives and runs: no document learns from another, filler is neither seen nor
counted, under every kind of layout that cuts a sequence or its heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.axes import enter
from parallel.grid import start_grid
from parallel.layout import Layout, rank_and_world
from pretrain import runs
from pretrain.build import build
from pretrain.data.manifest import Manifest
from pretrain.data.pairs import Lengths, prepare_pairs
from pretrain.data.prepare import Options, prepare
from pretrain.data.sources import Sources
from pretrain.data.stream import Stream
from pretrain.objectives.choice import objective_for
from pretrain.objectives.filler import filler
from tests.distributed import run_ranks
from tests.pretrain import running
from tests.pretrain.data.corpus import read_with_webdataset, write_source, write_texts
from tests.training import write_config

ROW = 64
SIZES = "num_layers: 2, hidden_size: 32, num_heads: 4, initial_scale: 0.3"
GPT = f"model={{kind: gpt, {SIZES}}}"
BERT = f"model={{kind: bert, norm_position: post, {SIZES}}}"
ENCODER_DECODER = f"model={{kind: encoder-decoder, decoder_layers: 2, {SIZES}}}"
APART = "objective.attention_across_documents=false"
MASKED = "objective={kind: masked, mask_rate: 0.5}"
SPANS = "objective={kind: span-corruption, noise_rate: 0.375, noise_span: 3.4}"
MODELS = {
    "gpt": [GPT, "objective={kind: causal, loss_across_documents: false}", APART],
    "gpt learned": [GPT, "model.positions=learned", "objective={kind: causal}", APART],
    "bert": [BERT, MASKED, APART],
    "prefix": [ENCODER_DECODER, "objective={kind: prefix}", APART],
    "spans": [ENCODER_DECODER, SPANS, APART],
    "pairs": [ENCODER_DECODER, "objective={kind: sequence-to-sequence, source_length: 32}"],
}
HIDDEN = {  # whose documents see each other, but no filler
    "bert": [BERT, MASKED],
    "bert pairs": [BERT, MASKED, "objective.pairs=order"],
    "spans": [ENCODER_DECODER, SPANS],
}
LAYOUTS: dict[str, list[str]] = {
    "": [],
    "tp=2": ["parallel.tensor=2"],
    "tp=2,sp": ["parallel.tensor=2", "parallel.sequence=true"],
    "cp=2": ["parallel.context=2"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short documents, several a row, as `fit` and `sentences` rows of text and as rows of pairs."""
    folder = tmp_path_factory.mktemp("packed")
    texts = [f"note {n}: {'some words, ' * (n % 5)}the end." + "\nmore of it" * (n % 4) for n in range(160)]
    corpus = write_texts(folder / "texts", texts)
    for kind in ("fit", "sentences"):
        prepare(
            [corpus],
            folder / kind,
            Options(vocab_size=300, validation=0.2, packing=kind, seq_length=ROW),
            processes=1,
            say=lambda _: None,
        )
    table = folder / "pairs.tsv"
    table.write_text("".join(f"{n} abc{' de' * (n % 5)}\t{n}{' fg' * (n % 6)}\n" for n in range(160)))
    prepare_pairs(
        [table], folder / "pairs", Lengths(32, 32), Options(vocab_size=290, validation=0.2), say=lambda _: None
    )
    return folder


def config_of(folder: Path, shards: Path, name: str, options: list[str], layout: str = "") -> tuple[str, list[str]]:
    """A file and overrides, with data of the name's kind."""
    folder.mkdir(exist_ok=True)
    path = write_config(folder, shards / ("pairs" if name == "pairs" else "fit"))
    return str(path), [f"data.seq_length={ROW}", "batch.micro_size=8", *options, *LAYOUTS[layout]]


# -- no document sees another ------------------------------------------------------------------------------------------


def differences(cases: list[tuple[str, str, list[str]]], hide: bool) -> dict[str, list[float]]:
    """In this rank's place: for each case, by its name, how much the logits that it has change at most at places of documents
    that nothing was changed of, and at those of the document that was; and the number of the former. hide: it is filler that
    is changed."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    grid = None
    for name, path, overrides in cases:
        config = runs.open_config(path, overrides, rank_and_world()[1])
        grid = grid or start_grid(Layout.of(config.parallel, rank_and_world()[1]), 60)
        sources = Sources.open(config)
        stage = build(config, grid, sources.sizes).stages[0]
        stage.eval()
        batch, documents = _several(objective_for(config, sources), sources.train, hide)
        numbers = documents.amin(dim=1) if not hide else documents.amax(dim=1)
        changed = batch._replace(inputs=_changed(batch, documents, numbers))
        before, after = _logits(stage, batch), _logits(stage, changed)
        moved = (before - after).abs().amax(dim=2)
        of, here = _of_targets(batch, documents, stage.module.parts.own)
        same = here & (of != numbers[:, None])
        most = [moved[places].max().item() if places.any() else 0.0 for places in (same, here & ~same)]
        found[name] = [*most, float(same.sum())]
        sources.train.close()
    return found


def _several(objective: Any, stream: Any, hide: bool) -> tuple[Any, Tensor]:
    """A batch of rows of at least two documents, or with filler, and the numbers (B, S) of the documents of its inputs."""
    numbers = np.arange(stream.samples_per_epoch)
    tokens = torch.from_numpy(stream.read(numbers))
    batch = objective(torch.from_numpy(numbers), tokens)
    documents = batch.documents
    kept = (documents != documents[:, :1]).any(dim=1) & (filler(tokens[:, :-4], stream.eos).any(dim=1) | (not hide))
    fields = {name: None if x is None else x[kept][:8] for name, x in batch._asdict().items()}
    assert kept.sum() >= 4
    return type(batch)(**fields), documents[kept][:8]


def _changed(batch: Any, documents: Tensor, numbers: Tensor) -> Tensor:
    """The inputs with other ids for one document of each row."""
    other = torch.where(batch.inputs == 7, 8, 7)
    inside = documents == numbers[:, None]
    return torch.where(inside, other, batch.inputs)


def _of_targets(batch: Any, documents: Tensor, own: Any) -> tuple[Tensor, Tensor]:
    """Documents of the places whose logits this rank has, and which of these are predicted."""
    if hasattr(batch, "places"):
        return documents.gather(1, batch.places), batch.mask > 0
    length = batch.targets.shape[1]
    return own(documents[:, -length:]), own(batch.mask) > 0


def _logits(stage: Any, batch: Any) -> Tensor:
    """This rank's part of them, of what the head was given."""
    kept: list[Tensor] = []

    def keep(head: Any, given: tuple[Any, ...]) -> None:
        kept.append(F.linear(enter(given[0], head.axis), head.weight, head.bias))

    handle = stage.module.head.register_forward_pre_hook(keep)
    with torch.no_grad():
        stage(batch)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_document_changes_no_logit_of_another(shards: Path, tmp_path: Path, layout: str) -> None:
    cases = [(name, *config_of(tmp_path / name, shards, name, text, layout)) for name, text in MODELS.items()]
    ranks = run_ranks(2 if layout else 1, differences, cases, False)
    for name in MODELS:
        others, own, count = np.array([found[name] for found in ranks]).T
        assert others.max() == 0.0 and own.max() > 1e-3 and count.sum() > 20, (name, others, own, count)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_filler_changes_no_logit_though_documents_see_each_other(shards: Path, tmp_path: Path, layout: str) -> None:
    cases = [(name, *config_of(tmp_path / name, shards, name, text, layout)) for name, text in HIDDEN.items()]
    ranks = run_ranks(2 if layout else 1, differences, cases, True)
    for name in HIDDEN:
        others, _, count = np.array([found[name] for found in ranks]).T
        assert others.max() == 0.0 and count.sum() > 20, (name, others, count)


# -- runs --------------------------------------------------------------------------------------------------------------

COMMON = [
    f"data.seq_length={ROW}",
    "schedule={kind: constant, warmup: 0 steps, total: 4 steps}",
    "monitor={log_every: 1 steps, validate_every: 4 steps, tensorboard: false}",
    "batch.micro_size=2",
]


def run_of(
    folder: Path, data: Path, options: list[str], *more: str, world: int = 1
) -> tuple[Path, list[dict[str, Any]]]:
    folder.mkdir()
    ran = running.command("train", write_config(folder, data), *COMMON, *options, *more, world=world)
    assert ran.code == 0, ran.told
    return folder / "run", running.lines_of(folder / "run")


@pytest.fixture(scope="module")
def gpt(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    return run_of(tmp_path_factory.mktemp("runs") / "gpt", shards / "fit", MODELS["gpt"])


@pytest.fixture(scope="module")
def bert(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    return run_of(tmp_path_factory.mktemp("runs") / "bert", shards / "sentences", HIDDEN["bert pairs"])


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_filler_is_no_token_of_a_rate(request: pytest.FixtureRequest, shards: Path, kind: str) -> None:
    _, lines = request.getfixturevalue(kind)
    stream = Stream([shards / ("fit" if kind == "gpt" else "sentences") / "train"], ROW, seed=1)
    for line in lines:
        if "tokens_per_second" in line:
            tokens = stream.read(np.arange(line["samples"] - 8, line["samples"]))[:, :-1]
            real = tokens.size - int(filler(torch.from_numpy(tokens), stream.eos).sum())
            assert real < tokens.size
            assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(real)
    assert sum("tokens_per_second" in line for line in lines) == 3
    stream.close()


def test_bits_are_of_the_text_alone(gpt: tuple[Path, list[dict[str, Any]]], shards: Path) -> None:
    line = next(line for line in gpt[1] if line.get("validation_loss") and line["step"] == 4)
    manifest = Manifest.load(shards / "fit" / "validation")
    assert manifest.padding > 1
    tokens = manifest.tokens - manifest.padding
    assert line["bits_per_byte"] == pytest.approx(line["validation_loss"] / np.log(2) * tokens / manifest.text_bytes)
    rows = (manifest.tokens - 1) // ROW
    # Of each row the first token is not predicted, and not a document's first token; the look-ahead is no text.
    stream = Stream([shards / "fit" / "validation"], ROW, seed=1, shuffle=False)
    text = torch.from_numpy(stream.read(np.arange(rows))[:, :-1])
    inside = ~filler(text, stream.eos)[:, 1:] & (text[:, :-1] != stream.eos)
    assert line["validation_targets"] == int(inside.sum())


def test_evaluate_scores_no_filler(gpt: tuple[Path, list[dict[str, Any]]], shards: Path) -> None:
    data = shards / "fit" / "validation"
    result = json.loads(running.command("evaluate", gpt[0], "--data", data).out)
    manifest = Manifest.load(data)
    assert result["tokens"] == manifest.tokens - manifest.padding and result["bytes"] == manifest.text_bytes


def test_evaluate_reads_an_encoders_rows_as_training_does(
    bert: tuple[Path, list[dict[str, Any]]], shards: Path
) -> None:
    """The same rows have the same masks, so the last validation is found again."""
    line = next(line for line in bert[1] if line.get("validation_loss") and line["step"] == 4)
    result = json.loads(running.command("evaluate", bert[0], "--data", shards / "sentences" / "validation").out)
    assert result["loss"] == pytest.approx(line["validation_loss"], rel=1e-5)
    assert result["targets"] == line["validation_targets"]
    assert result["sequences"] == (Manifest.load(shards / "sentences" / "validation").tokens - 1) // ROW


@pytest.fixture(scope="module")
def gaps(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of `fit`, of which all but every fourth could not be read, as rows that are no packed ones."""
    folder = tmp_path_factory.mktemp("gaps")
    tokenizer = Manifest.load(shards / "fit" / "train").tokenizer()
    for part in ("train", "validation"):
        tokens = read_with_webdataset(shards / "fit" / part)
        rows = tokens[:-1].reshape(-1, ROW)
        rows[np.arange(len(rows)) % 4 > 0] = tokenizer.eos
        write_source(folder / part, np.append(rows.reshape(-1), tokenizer.eos), tokenizer, ROW)
    return folder


@pytest.mark.parametrize("name", ["gpt", "bert pairs", "spans", "prefix"])
def test_rows_of_filler_alone_make_no_loss_that_is_none(gaps: Path, tmp_path: Path, name: str) -> None:
    """Micro-batches of one sample, so that three of four have no target; on two ranks also all of one rank's."""
    options = {**MODELS, **HIDDEN}[name]
    world = 2 if name == "gpt" else 1
    _, lines = run_of(tmp_path / "run", gaps, options, "batch={size: 2, micro_size: 1}", world=world)
    losses = [line["loss"] for line in lines if "loss" in line]
    norms = [line["grad_norm"] for line in lines if "grad_norm" in line]
    assert len(losses) == 4 and np.isfinite(losses).all() and np.isfinite(norms).all()
    assert all((loss == 0) == (norm == 0) for loss, norm in zip(losses, norms, strict=True))
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert validated and np.isfinite(validated).all() and min(validated) > 0


MISTAKES = [
    ("fit", ["data.seq_length=32", *MODELS["gpt"]], "holds rows of 64 tokens (fit 64), which are read whole"),
    ("sentences", MODELS["gpt"], "each ended as a document is, and objective.kind: causal would learn these ends"),
    ("fit", MODELS["pairs"], "holds text, but objective.kind: sequence-to-sequence"),
]


@pytest.mark.parametrize(("kind", "options", "words"), MISTAKES, ids=[case[2] for case in MISTAKES])
def test_rows_that_are_not_the_runs_are_refused(
    shards: Path, tmp_path: Path, kind: str, options: list[str], words: str
) -> None:
    ran = running.command("train", write_config(tmp_path, shards / kind), f"data.seq_length={ROW}", *options)
    running.assert_refused(ran, words)


def test_phases_of_other_lengths_are_refused(shards: Path, tmp_path: Path) -> None:
    phases = "data.phases=[{seq_length: 32, length: 2 steps}]"
    ran = running.command("train", write_config(tmp_path, shards / "fit"), f"data.seq_length={ROW}", phases)
    running.assert_refused(ran, "which are read whole, not in sequences of 32")


def test_a_model_that_hides_filler_is_built_for_documents(shards: Path, tmp_path: Path) -> None:
    """A backend that cannot keep documents apart must not be chosen for it."""
    for name, data, apart in (
        ("bert", "fit", True),
        ("spans", "fit", True),
        ("pairs", "pairs", True),
        ("gpt", "fit", False),
    ):
        options = {**MODELS, **HIDDEN}[name] if name != "gpt" else [GPT]
        folder = tmp_path / name
        folder.mkdir()
        wish = "kernels.attention=flash"
        ran = running.command(
            "train", write_config(folder, shards / data), *COMMON, *options, wish, "model.dropout=0.0"
        )
        assert (ran.code != 0) == apart, ran.told
        if apart:
            assert "cannot keep documents apart" in ran.told
