"""A sample is shown as the objective makes it: what is hidden, what stands there instead, where documents are."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from pretrain.config.load import load_config
from pretrain.data.inspecting.samples import (
    FILLER,
    KEPT,
    MASKED,
    NOT_PREDICTED,
    RANDOM,
    SPECIAL,
    Speller,
    legend,
    plain_row,
    tell_row,
)
from pretrain.data.inspecting.seen import names_of, rows_of_batch
from pretrain.objectives.choice import objective_of
from pretrain.objectives.masked import Masked
from pretrain.tokenization.base import Tokenizer
from pretrain.vocabulary import vocabulary_of
from tests.distributed import REPOSITORY
from tests.pretrain.data.corpus import stdlib_texts

TEXTS = [stdlib_texts(1)[0][:300], "Ärger mit Öl \U0001f680 und\ttabs\n", "\x1b[2J\x1b]0;owned\x07 hostile\x9b"]


@pytest.fixture(scope="module")
def row(tokenizer: Tokenizer) -> np.ndarray:
    """65 tokens of several documents."""
    ids = [index for text in TEXTS for index in [*tokenizer.encode(text)[:27], tokenizer.eos]]
    return np.array(ids[:65], np.int64)


def console(colour: bool = False) -> Console:
    system = "truecolor" if colour else None
    return Console(
        file=io.StringIO(), force_terminal=colour, color_system=system, emoji=False, soft_wrap=True, width=90
    )  # type: ignore[arg-type]


def told(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def seen(name: str, row: np.ndarray, tokenizer: Tokenizer, *overrides: str, number: int = 7):  # type: ignore[no-untyped-def]
    config = load_config(REPOSITORY / "configs" / name, ["data.validation=x", *overrides])
    vocabulary = vocabulary_of(config, tokenizer)
    objective = objective_of(config, tokenizer, vocabulary, 8)
    batch = objective(torch.tensor([number]), torch.from_numpy(row)[None])
    return rows_of_batch(batch, vocabulary, packed=False), batch, Speller(tokenizer, names_of(vocabulary)), objective


def test_documents_without_an_objective_read_as_the_tokenizer_decodes_them(
    row: np.ndarray, tokenizer: Tokenizer
) -> None:
    out = console()
    tell_row(plain_row(row, tokenizer.eos, packed=False), Speller(tokenizer, {}), out)
    parts = re.split(r"^--- document \d of 3: tokens \d+ to \d+\n", told(out), flags=re.MULTILINE)[1:]
    cut = [part for part in np.split(row, np.flatnonzero(row == tokenizer.eos) + 1) if part.size]
    assert parts[:2] == [tokenizer.decode(part.tolist()) + "\n" for part in cut[:2]]
    assert "\\x1b" in parts[2] and "\x1b" not in told(out) and "\x9b" not in told(out)


def test_what_fills_a_row_is_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos
    text = tokenizer.encode("one two")
    row = np.array([*text, eos, eos, eos, *text, eos, eos])
    shown = plain_row(row, eos, packed=False)
    assert [place for place, mark in enumerate(shown.marks) if mark == FILLER] == [
        len(text) + 1, len(text) + 2, len(row) - 1,
    ]  # fmt: skip
    out = console()
    tell_row(shown, Speller(tokenizer, {}), out)
    assert re.findall(r"^---.*", told(out), re.MULTILINE) == [
        f"--- document 1 of 2: tokens 0 to {len(text)}",
        f"--- filler: 2 document ends (tokens {len(text) + 1} to {len(text) + 2})",
        f"--- document 2 of 2: tokens {len(text) + 3} to {len(row) - 2}",
        f"--- filler: 1 document ends (tokens {len(row) - 1} to {len(row) - 1})",
    ]
    assert plain_row(row[len(text) :], eos, packed=True).marks[0] == FILLER


@pytest.mark.parametrize("masking", ["token", "span"])
def test_masked_places_are_those_of_the_objective(row: np.ndarray, tokenizer: Tokenizer, masking: str) -> None:
    overrides = ["objective.pairs=none", f"objective.masking={masking}", "objective.mask_rate=0.5"]
    overrides += ["objective.mask_share=0.4", "objective.random_share=0.3"]
    [shown], batch, speller, objective = seen("bert/demo.yaml", row, tokenizer, *overrides)
    assert isinstance(objective, Masked)
    assert shown.tokens.tolist() == objective._single(torch.from_numpy(row)[None])[0][0].tolist()
    assert shown.shown.tolist() == batch.inputs[0].tolist()
    places = set(batch.places[0][batch.mask[0] > 0].tolist())
    marked = {place for place, mark in enumerate(shown.marks) if mark in (MASKED, RANDOM, KEPT)}
    assert marked == places and {MASKED, RANDOM, KEPT} <= set(shown.marks)
    for place in places:
        mark = shown.marks[place]
        assert (mark == MASKED) == (shown.shown[place] == objective.symbols.mask)
        assert (mark == KEPT) == (shown.shown[place] == shown.tokens[place])
    assert shown.marks[0] == shown.marks[-1] == SPECIAL

    out = console()
    tell_row(shown, speller, out)
    text = re.sub(r"^---.*\n", "", told(out), flags=re.MULTILINE)
    unmarked = re.sub(r"«=?(.*?)(\|[^»]*)?»", r"\1", text, flags=re.DOTALL)
    assert unmarked.startswith("[CLS]") and text.count("«") >= 3
    first = tokenizer.decode(row[:27].tolist())
    assert unmarked.removeprefix("[CLS]").startswith(first[:20]), "the text reads on through the marks"


def test_colours_stand_for_the_marks_on_a_terminal(row: np.ndarray, tokenizer: Tokenizer) -> None:
    [shown], _, speller, _ = seen("bert/demo.yaml", row, tokenizer, "objective.pairs=none")
    out = console(colour=True)
    legend(set(shown.marks), out)
    tell_row(shown, speller, out)
    assert "\x1b[30;41m" in told(out) and "«" not in told(out)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", told(out))
    assert "\x1b" not in bare and "\x9b" not in bare and "hidden behind the mask" in bare


def test_segments_of_a_pair_stand_apart(row: np.ndarray, tokenizer: Tokenizer) -> None:
    both = np.concatenate([row, row[::-1]])
    [shown], batch, speller, _ = seen("bert/demo.yaml", both, tokenizer, "objective.pairs=next")
    assert shown.segments is not None and shown.segments.tolist() == batch.segments[0].tolist()
    out = console()
    tell_row(shown, speller, out)
    assert re.search(r"^--- document 1 of \d, segment A: .*^--- document \d of \d, segment B: ", told(out), re.M | re.S)


def test_positions_begin_anew_where_documents_are_kept_apart(row: np.ndarray, tokenizer: Tokenizer) -> None:
    fields = ["objective.attention_across_documents=false", "objective.loss_across_documents=false"]
    [shown], batch, speller, _ = seen("gpt/demo.yaml", row, tokenizer, *fields)
    assert shown.tokens.tolist() == row[:-1].tolist()
    assert shown.documents.tolist() == batch.documents[0].tolist()
    unpredicted = [place for place, mark in enumerate(shown.marks) if mark == NOT_PREDICTED]
    assert unpredicted == [place + 1 for place in np.flatnonzero(batch.mask[0].numpy() == 0).tolist()] != []
    out = console()
    tell_row(shown, speller, out)
    found = re.findall(
        r"^--- document (\d) of 3: tokens (\d+) to (\d+), positions (\d+) to (\d+)$", told(out), re.MULTILINE
    )
    assert [int(one[0]) for one in found] == [1, 2, 3] and {one[3] for one in found} == {"0"}
    assert all(int(last) - int(first) == int(to) for _, first, last, _, to in found)


def test_an_encoder_decoders_sample_is_two_rows(row: np.ndarray, tokenizer: Tokenizer) -> None:
    (source, target), batch, speller, _ = seen("transformer/t5-style-small.yaml", row, tokenizer)
    width = len(target.tokens)
    assert source.tokens.tolist() == batch.inputs[0][:-width].tolist()
    assert target.tokens.tolist() == batch.targets[0].tolist()
    out = console()
    for part in (source, target):
        tell_row(part, speller, out)
    assert told(out).count("[SPAN 0]") == 2 and told(out).count("[SPAN 1]") == 2
