"""An encoder-decoder through the real commands: it learns pairs, resumes bitwise, is scored alike by every command, averages,
and refuses what it is not."""

from __future__ import annotations

import itertools
import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu import corpus_bleu

from pretrain.checkpoint import open_checkpoint, read_weight, weight_shapes
from pretrain.data.made import docstrings, reversals
from pretrain.data.pairs import Lengths, prepare_pairs
from pretrain.data.preparing.options import Options
from pretrain.loading import Loaded, load_model
from pretrain.models.transformer import EncoderDecoder
from pretrain.opening import folder_of
from pretrain.translation import Search, Written, pairs_in, scores_of, translate
from tests.pretrain import running
from tests.pretrain.kills import Death, Spot, arm

MODEL = (
    "model={kind: encoder-decoder, num_layers: 1, hidden_size: 32, num_heads: 4, positions: sinusoidal, dropout: 0.1}"
)
PAIRS = (MODEL, "objective={kind: sequence-to-sequence, source_length: 40, label_smoothing: 0.1}", "data.seq_length=80")
OPTIONS = (*PAIRS, "monitor.validation_samples=null", "monitor.translate_pairs=6", "optimizer.learning_rate=5.0e-3")
OPTIONS += ("checkpoint.keep_last=3", "schedule.total=15 steps")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    table = folder / "pairs.tsv"
    rows = [("".join(a.split())[:4], "".join(b.split())[-4:]) for a, b in itertools.islice(reversals(), 400)]
    table.write_text("".join(f"{source}\t{target}\n" for source, target in rows))
    options = Options(vocab_size=310, validation=0.1)
    prepare_pairs([table], folder / "shards", Lengths(40, 40), options, say=lambda _: None)
    return folder / "shards"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("translation")
    ran = running.train(folder, shards, *OPTIONS)
    assert ran.code == 0, ran.told
    assert "bleu" in ran.out and "without learning: bleu" in ran.out
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(run: Path) -> Loaded:
    return load_model(run)


def held_out(loaded: Loaded, shards: Path) -> list[tuple[str, str]]:
    from pretrain.data.stream import Stream

    return list(pairs_in(Stream([shards / "validation"], 80, 1, shuffle=False), 40))


def scored(*arguments: str | Path) -> dict[str, Any]:
    ran = running.command("evaluate", *arguments)
    assert ran.code == 0, ran.told
    found: dict[str, Any] = json.loads(ran.out)
    return found


# -- the real commands -------------------------------------------------------------------------------------------------


def test_evaluate_agrees_with_the_training(run: Path, loaded: Loaded, shards: Path, tmp_path: Path) -> None:
    """Rows of packed pairs, in batches, or each pair by itself: of shards, or of a table."""
    last = [line for line in running.lines_of(run) if "validation_loss" in line][-1]
    first = next(line for line in running.lines_of(run) if "validation_loss" in line)
    assert last["validation_loss"] < first["validation_loss"] and "bits_per_byte" not in last
    table = tmp_path / "held-out.tsv"
    pairs = held_out(loaded, shards)
    table.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    found = scored(run, "--data", table, "--beams", "1")
    assert found["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(last["validation_accuracy"], rel=1e-6)
    assert found["pairs"] == len(pairs) and found["tokens"] == last["validation_targets"]
    assert scored(run, "--data", shards / "validation", "--beams", "1") == found
    six = [Written(source, "", 0.0, target) for source, target in pairs[:6]]
    assert last["floor_validation_bleu"] == pytest.approx(scores_of(six)["floor_bleu"])


def test_predict_writes_what_is_scored_and_goes_on(run: Path, loaded: Loaded, shards: Path, tmp_path: Path) -> None:
    pairs = held_out(loaded, shards)[:8]
    source, out = tmp_path / "sources.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"{pair[0]}\n" for pair in pairs))
    ran = running.command("predict", run, "--input", source, "--out", out)
    assert ran.code == 0, ran.told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(range(8))
    model, tokenizer = loaded.model, loaded.tokenizer
    assert isinstance(model, EncoderDecoder)
    for line, (text, _) in zip(lines, pairs, strict=True):
        best = translate(model, tokenizer.encode(text), tokenizer.eos, Search())
        assert (line["text"], line["score"]) == (tokenizer.decode(best.tokens), pytest.approx(best.score, rel=1e-5))
    table = tmp_path / "pairs.tsv"
    table.write_text("".join(f"{one}\t{two}\n" for one, two in pairs))
    assert running.command("predict", run, "--input", table, "--out", tmp_path / "again.jsonl").code == 0
    assert (tmp_path / "again.jsonl").read_text() == out.read_text(), "of a table the first column"
    written = [Written(one, line["text"], 0.0, two) for line, (one, two) in zip(lines, pairs, strict=True)]
    found = scored(run, "--data", table)
    assert {name: found[name] for name in scores_of(written)} == scores_of(written)


def test_generate_writes_a_target_for_the_prompt(run: Path, loaded: Loaded, shards: Path) -> None:
    source = held_out(loaded, shards)[0][0]
    model, tokenizer = loaded.model, loaded.tokenizer
    assert isinstance(model, EncoderDecoder)
    best = translate(model, tokenizer.encode(source), tokenizer.eos, Search(3, 0.5))
    ran = running.command("generate", run, "--prompt", source, "--beams", "3", "--length-penalty", "0.5")
    assert ran.out == tokenizer.decode(best.tokens) + "\n"
    greedy = translate(model, tokenizer.encode(source), tokenizer.eos, Search(1))
    drawn = running.command("generate", run, "--prompt", source, "--temperature", "0")
    assert drawn.out == tokenizer.decode(greedy.tokens) + "\n"


def test_killed_and_started_again_it_is_the_same_run(run: Path, tmp_path: Path, shards: Path) -> None:
    death = Death("killed", Spot("optimizer step", count=8), rank=0, number=signal.SIGKILL)
    running.train_killed(tmp_path, shards, *OPTIONS, fault=partial(arm, tmp_path, death))
    ran = running.train(tmp_path, shards, *OPTIONS)
    assert ran.code == 0 and "going on after step" in ran.out, ran.told
    running.assert_same_run(run, tmp_path / "run")


def test_the_average_is_the_mean_of_the_checkpoints(run: Path, tmp_path: Path) -> None:
    steps = running.steps_of(run)[-2:]
    ran = running.command("average", run, "--last", "2", "--out", tmp_path / "mean")
    assert ran.code == 0 and f"the mean of the steps {steps[0]}, {steps[1]}" in ran.out, ran.told
    mean = open_checkpoint(folder_of(tmp_path / "mean", 0))
    parts = [open_checkpoint(folder_of(run, step)) for step in steps]
    for name in weight_shapes(parts[0]):
        wanted = (read_weight(parts[0], name).double() + read_weight(parts[1], name).double()) / 2
        assert torch.equal(read_weight(mean, name), wanted.float()), name
    assert load_model(tmp_path / "mean").config.run.dir == str(tmp_path / "mean")


MISTAKES = [
    (("evaluate", "--data", "TEXT"), ["holds text, not pairs", "prepare --pairs"]),
    (("evaluate", "--data", "TABLE", "--beams", "0"), ["--beams 0: give at least 1"]),
    (("evaluate", "--data", "TABLE", "--stride", "4"), ["--stride 4: has no effect on pairs"]),
    (("evaluate", "--data", "HALF"), ["half.tsv:1:", "target"]),
    (("predict", "--input", "TABLE", "--out", "OUT", "--length-penalty", "-1"), ["--length-penalty -1.0: give 0"]),
    (
        ("predict", "--input", "TABLE", "--out", "OUT", "--beams", "1", "--length-penalty", "1"),
        ["follows one hypothesis"],
    ),
    (("average", "--out", "OUT", "--last", "1"), ["give at least 2"]),
    (("average", "--out", "OUT", "--last", "9"), ["has 3 checkpoints", "checkpoint.keep_last=9"]),
]


@pytest.mark.parametrize(("command", "words"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_mistakes(run: Path, tiny_data: Path, tmp_path: Path, command: tuple[str, ...], words: list[str]) -> None:
    (tmp_path / "table.tsv").write_text("abcd\tdcba\n")
    (tmp_path / "half.tsv").write_text("abcd\n")
    names = {"TEXT": tiny_data / "train", "TABLE": tmp_path / "table.tsv", "HALF": tmp_path / "half.tsv"}
    names["OUT"] = tmp_path / "out"
    first, *rest = (str(names.get(word, word)) for word in command)
    running.assert_refused(running.command(first, run, *rest), *words)
    assert not (tmp_path / "out").exists()


CONFIGS = [
    (("objective={kind: prefix}", "monitor.translate_pairs=4"), ["monitor.translate_pairs", "has no effect"]),
    (("objective={kind: causal}",), ["causal does not train an encoder-decoder", "set model.kind: gpt"]),
    (("objective={kind: classification}", "model.initial=x"), ["has its head on one stack"]),
    (("objective={kind: span-corruption, sentinels: 1}",), ["objective.sentinels", "fewer than the 2 spans"]),
    (("objective={kind: sequence-to-sequence, source_length: 99}",), ["leaves nothing of data.seq_length 32"]),
    (("objective={kind: prefix}", "model.segments=2"), ["model.segments", "an encoder-decoder has none"]),
]


@pytest.mark.parametrize(("options", "words"), CONFIGS, ids=[case[0][0] for case in CONFIGS])
def test_configurations_that_cannot_be(
    tiny_data: Path, tmp_path: Path, options: tuple[str, ...], words: list[str]
) -> None:
    running.assert_refused(running.train(tmp_path, tiny_data, MODEL, *options), *words)


# -- text ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["{kind: prefix}", "{kind: span-corruption, noise_rate: 0.3}"])
def test_text_is_learned_and_scored_alike(tiny_data: Path, tmp_path: Path, objective: str) -> None:
    """Validation in training and `evaluate` on the same shards are one figure."""
    options = (MODEL, f"objective={objective}", "monitor.validation_samples=null", "schedule.total=6 steps")
    ran = running.train(tmp_path, tiny_data, *options)
    assert ran.code == 0, ran.told
    last = [line for line in running.lines_of(tmp_path / "run") if "validation_loss" in line][-1]
    found = scored(tmp_path / "run", "--data", tiny_data / "validation")
    assert found["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(last["validation_accuracy"], abs=1e-6)
    assert ("bits_per_byte" in last) == ("bits_per_byte" in found) == ("prefix" in objective)
    if "prefix" in objective:
        assert found["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-3)


# -- searching and scoring ----------------------------------------------------------------------------------------------


def test_greedy_is_step_by_step_the_likeliest(loaded: Loaded, shards: Path) -> None:
    model, eos = loaded.model, loaded.tokenizer.eos
    assert isinstance(model, EncoderDecoder)
    for source, _ in held_out(loaded, shards)[:4]:
        ids, tokens = loaded.tokenizer.encode(source), [eos]
        memory = model.encode(torch.tensor([[*ids, eos]]))
        while len(tokens) <= model.max_length:
            tokens.append(int(model.logits(torch.tensor([tokens]), memory)[0, -1].argmax()))
            if tokens[-1] == eos:
                break
        wanted = [token for token in tokens[1:] if token != eos]
        assert translate(model, ids, eos, Search(1)).tokens == wanted


def test_more_beams_find_nothing_less_likely(loaded: Loaded, shards: Path) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    assert isinstance(model, EncoderDecoder)
    for source, _ in held_out(loaded, shards)[:8]:
        one, four = (translate(model, tokenizer.encode(source), tokenizer.eos, Search(k, 0.0)) for k in (1, 4))
        assert four.log_probability >= one.log_probability - 1e-4


def test_scores() -> None:
    written = [Written("a b c d e", "v w x y z", 0.0, "v w x y z"), Written("f g h i", "f g h j", 0.0, "f g h i")]
    found = scores_of(written)
    assert found["exact_match"] == 0.5 and found["floor_exact_match"] == 0.5
    texts, wanted = [one.text for one in written], [str(one.wanted) for one in written]
    assert found["bleu"] == pytest.approx(corpus_bleu(texts, [wanted]).score)
    assert scores_of([written[0]])["bleu"] == 100.0 and scores_of([written[0]])["floor_bleu"] == 0.0


def test_pairs_that_every_machine_makes() -> None:
    rows = list(reversals())
    assert rows == list(reversals()) and len(set(rows)) == len(rows)
    assert all(source.split() == target.split()[::-1] for source, target in rows)
    made = list(docstrings())
    assert len(made) > 3000 and len(set(made)) == len(made)
    assert all(source.strip() and target.strip() and "\t" not in source + target for source, target in made)
