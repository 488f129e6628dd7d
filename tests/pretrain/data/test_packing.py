"""Documents in rows: by the plain algorithm, nothing lost, hardly anything left empty, whatever the blocks."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import packing as packed
from pretrain.data.manifest import Manifest
from pretrain.data.packing import AROUND, Packer, Packing, best_fit, packer_of, places_of, sentence_ends
from pretrain.data.prepare import Options
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from tests.pretrain import running
from tests.pretrain.data.corpus import (
    ODD,
    hashes,
    join,
    quietly,
    read_with_webdataset,
    stdlib_texts,
    write_texts,
)
from tests.training import write_config

EOS, STOP, VOCAB = 0, 1, 50  # STOP ends a sentence
DTYPE = np.dtype("<u2")
ENDS = np.arange(VOCAB) == STOP


def documents_of(lengths: Iterable[int]) -> list[list[int]]:
    """Documents of these lengths, ends included, of which no two are the same where they can differ."""
    places = np.cumsum([0, *lengths])
    tokens = (np.arange(places[-1]) * 48271 + np.arange(places[-1]) ** 2 % 131) % (VOCAB - 1) + 1
    return [[*tokens[first : last - 1].tolist(), EOS] for first, last in itertools.pairwise(places)]


def rows_of(packer: Packer, documents: Iterable[Sequence[int]], row: int) -> list[list[int]]:
    made = [part for document in documents for part in packer.add(np.array(document, DTYPE))]
    made += packer.finish()
    assert all(part.dtype == DTYPE and len(part) % row == 0 for part in made)
    rows: list[list[int]] = np.concatenate([*made, np.empty(0, DTYPE)]).reshape(-1, row).tolist()
    return rows


def parts_of(row: Sequence[int]) -> list[list[int]]:
    """What a row holds: documents or pieces of them; an end behind an end is none."""
    found: list[list[int]] = [[]]
    for token in row:
        if token != EOS or found[-1]:
            found[-1].append(token)
        if token == EOS and found[-1]:
            found.append([])
    return [part for part in found if part]


def pieces_of(document: Sequence[int], row: int) -> list[list[int]]:
    """A document cut into rows, without an end that would be left alone."""
    pieces = [list(document[first : first + row]) for first in range(0, len(document), row)]
    return [piece for piece in pieces if piece != [EOS]]


def plain_best_fit(lengths: Sequence[int], size: int) -> list[int]:
    """Best-fit-decreasing as it is told, piece by piece: how full each row is. Among rows as full as each other any will do."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        able = [row for row in rows if size - sum(row) >= length]
        row = min(able, key=lambda row: size - sum(row), default=None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    return sorted(map(sum, rows))


# -- how it is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["concat", "fit 1024", "sentences 128", "pairs 40 24", "fit-pairs 128 96"])
def test_a_packing_is_its_text(text: str) -> None:
    packing = Packing.parse(text)
    assert str(packing) == text and packing == Packing(packing.kind, packing.lengths)
    assert packing.row == (sum(map(int, text.split()[1:])) or 1)
    assert (packing.is_pairs, packing.is_rows_of_text) == ("pairs" in text, text.split()[0] in ("fit", "sentences"))


@pytest.mark.parametrize(
    "text", ["", "fit", "fit 1", "fit x", "fit 1e3", "fit -5", "fit 123456789", "concat 8", "pairs 8"]
)
def test_what_is_no_packing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no packing"):
        Packing.parse(text)


def test_pairs_and_sentences_without_their_ends_have_no_packer() -> None:
    with pytest.raises(ValueError, match="is no packing of text"):
        packer_of(Packing.parse("pairs 8 8"), DTYPE, EOS)
    with pytest.raises(ValueError, match="need sentence_ends"):
        packer_of(Packing.parse("sentences 8"), DTYPE, EOS)


# -- best fit ----------------------------------------------------------------------------------------------------------

LENGTHS = st.integers(2, 40).flatmap(
    lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), min_size=1, max_size=150))
)


@given(LENGTHS)
@settings(deadline=None, max_examples=300)
def test_best_fit_is_the_plain_algorithm(case: tuple[int, list[int]]) -> None:
    size, lengths = case
    rows = best_fit(np.array(lengths), size)
    assert sorted(np.bincount(rows, lengths).astype(int).tolist()) == plain_best_fit(lengths, size)


@given(LENGTHS)
@settings(deadline=None, max_examples=100)
def test_pieces_of_a_row_lie_one_behind_the_other_in_their_order(case: tuple[int, list[int]]) -> None:
    size, lengths = case
    rows = best_fit(np.array(lengths), size)
    places, count = places_of(np.array(lengths), rows, size)
    firsts, free = [], {row: row * size for row in range(count)}
    for place, length in zip(places.tolist(), lengths, strict=True):
        row = place // size
        assert place == free[row] and place + length <= (row + 1) * size
        firsts += [row] if place == row * size else []
        free[row] = place + length
    assert firsts == list(range(count)), "rows stand where their first pieces stood"


@given(st.integers(2, 30), st.lists(st.integers(1, 100), min_size=1, max_size=80))
@settings(deadline=None, max_examples=200)
def test_fit_keeps_every_document_and_piece(row: int, lengths: list[int]) -> None:
    documents = documents_of(lengths)
    packer = packer_of(Packing("fit", (row,)), DTYPE, EOS)
    rows = rows_of(packer, documents, row)
    wanted = [piece for document in documents for piece in pieces_of(document, row)]
    found = [part for tokens in rows for part in parts_of(tokens)]
    assert Counter(map(tuple, found)) == Counter(map(tuple, wanted))
    assert packer.padding == len(rows) * row - sum(map(len, wanted))
    assert all(tokens[-1] == EOS or len(parts_of(tokens)[-1]) == row for tokens in rows), "a row's rest is filler"


def test_blocks_are_bounded_in_documents_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block holds is packed by itself, and then given away."""
    documents = documents_of([5, 9, 30, 2, 7, 3, 12, 4] * 6)
    for name, bound, block in (("BLOCK_DOCUMENTS", 8, 8), ("BLOCK_TOKENS", 72, 8)):
        with monkeypatch.context() as patch:
            patch.setattr(packed, name, bound)
            packer = packer_of(Packing("fit", (16,)), DTYPE, EOS)
            given_away = [[part.tolist() for part in packer.add(np.array(document, DTYPE))] for document in documents]
            assert [number for number, parts in enumerate(given_away, 1) if parts] == list(range(block, 49, block))
            assert not list(packer.finish())
        for first in range(0, len(documents), block):
            alone = packer_of(Packing("fit", (16,)), DTYPE, EOS)
            rows = rows_of(alone, documents[first : first + block], 16)
            assert given_away[first + block - 1] == [[token for row in rows for token in row]]


def test_a_document_does_not_keep_the_batch_that_it_came_in() -> None:
    """Of a part that takes one document of a hundred the block would hold the whole corpus."""
    packer, batch = packer_of(Packing("fit", (16,)), DTYPE, EOS), np.ones(1 << 16, DTYPE)
    assert not list(packer.add(batch[:10]))
    assert isinstance(packer, packed.BestFit)
    assert packer._documents[0].base is None and not np.shares_memory(packer._documents[0], batch)


def test_a_million_documents_take_seconds() -> None:
    """A tenth of them here; the time of the whole is told in docs/log.md."""
    lengths = np.maximum(2, np.random.default_rng(1).lognormal(5.0, 1.2, 100_000)).astype(int)
    tokens = np.full(lengths.max(), 5, DTYPE)
    packer, begun, count = packer_of(Packing("fit", (1024,)), DTYPE, EOS), time.process_time(), 0
    for length in lengths.tolist():
        count += sum(map(len, packer.add(tokens[:length])))
    count += sum(map(len, packer.finish()))
    assert time.process_time() - begun < 5
    assert packer.padding < 0.01 * count


# -- sentences ---------------------------------------------------------------------------------------------------------


@given(st.integers(4, 20), st.lists(st.integers(1, 60), min_size=1, max_size=20))
@settings(deadline=None, max_examples=200)
def test_rows_of_sentences(row: int, lengths: list[int]) -> None:
    """One document each, in order; as many whole sentences as fit, and a longer one cut."""
    documents, most = documents_of(lengths), row - AROUND
    packer = packer_of(Packing("sentences", (row,)), DTYPE, EOS, ENDS)
    made = [rows_of(packer, [document], row) for document in documents]
    for document, rows in zip(documents, made, strict=True):
        texts = [parts_of(tokens)[0][:-1] for tokens in rows]
        assert all(tokens == [*text, *[EOS] * (row - len(text))] for tokens, text in zip(rows, texts, strict=True))
        assert [token for text in texts for token in text] == document[:-1] and all(
            0 < len(text) <= most for text in texts
        )
        for text, following in itertools.pairwise(texts):
            more = following.index(STOP) + 1 if STOP in following else len(following)
            if text[-1] == STOP:
                assert len(text) + more > most, "the next sentence had fitted"
            else:
                assert len(text) == most and STOP not in text, "only a sentence that fits no row is cut"
    total = sum(map(len, made))
    assert packer.padding == total * row - sum(len(document) - 1 for document in documents) - total


def test_sentences_end_where_people_end_them(tokenizer: Tokenizer) -> None:
    ends = sentence_ends(tokenizer)
    assert ends.shape == (tokenizer.vocab_size,)
    for text, last in (("a line\n", True), ("so. ", False), ("so.", True), ("a word", False)):
        assert ends[tokenizer.encode(text)[-1]] == last, text


# -- prepare -----------------------------------------------------------------------------------------------------------

TEXTS = [*stdlib_texts(), *ODD, *(f"note {n}: {'word ' * (n % 7)}\nend" for n in range(60))]
ROW = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts", TEXTS)


@pytest.fixture(scope="module", params=["fit", "sentences"])
def prepared(request: pytest.FixtureRequest, corpus: Path, model_file: Path, tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp(request.param) / "out"
    quietly([corpus], out, tokenizer=model_file, validation=0.2, packing=request.param, seq_length=ROW)
    return out


def rows_in(folder: Path) -> list[list[int]]:
    tokens = read_with_webdataset(folder)
    assert len(tokens) % ROW == 1 and tokens[-1] == Manifest.load(folder).eos
    rows: list[list[int]] = tokens[:-1].reshape(-1, ROW).tolist()
    return rows


@pytest.mark.parametrize("processes", [1, 2])
def test_bytes_are_the_same_for_any_number_of_processes(
    prepared: Path, corpus: Path, model_file: Path, tmp_path: Path, processes: int
) -> None:
    kind = Manifest.load(prepared / "train").packing.kind
    options = {"tokenizer": model_file, "validation": 0.2, "packing": kind, "seq_length": ROW}
    quietly([corpus], tmp_path / "out", processes, **options)
    assert hashes(tmp_path / "out") == hashes(prepared)


def test_rows_give_back_the_documents_byte_for_byte(prepared: Path, tokenizer: Tokenizer) -> None:
    """Cut pieces joined, each to those of its own document: pieces of tokens that are no whole characters too."""
    kind = Manifest.load(prepared / "train").packing.kind
    rows = [row for part in ("train", "validation") for row in rows_in(prepared / part)]
    parts = Counter(tuple(part) for row in rows for part in _parts(row, tokenizer.eos, kind))
    for text in TEXTS:
        document = tokenizer.encode(text)
        pieces = _cut(document, kind, tokenizer)
        parts -= Counter(map(tuple, pieces))
        assert tokenizer.decode([token for piece in pieces for token in piece]).encode() == text.encode()
    wanted = Counter(tuple(piece) for text in TEXTS for piece in _cut(tokenizer.encode(text), kind, tokenizer))
    assert not parts and wanted.total() == sum(len(_parts(row, tokenizer.eos, kind)) for row in rows)


def _parts(row: list[int], eos: int, kind: str) -> list[list[int]]:
    """The texts of a row, without ends."""
    array = np.array(row)
    parts = [part[part != eos].tolist() for part in np.split(array, np.flatnonzero(array == eos) + 1)]
    found = [part for part in parts if part]
    assert kind == "fit" or len(found) == 1
    return found


def _cut(text: list[int], kind: str, tokenizer: Tokenizer) -> list[list[int]]:
    if kind == "fit":
        return [text[first : first + ROW] for first in range(0, len(text), ROW)]
    ends, found, most = sentence_ends(tokenizer), [], ROW - AROUND
    while len(text) > most:
        last = max((place for place in range(1, most + 1) if ends[text[place - 1]]), default=most)
        found, text = [*found, text[:last]], text[last:]
    return [*found, text]


def test_the_report_and_the_manifests_say_what_is_filler(prepared: Path) -> None:
    report = json.loads((prepared / "report.json").read_bytes())["parts"]
    for part in ("train", "validation"):
        manifest, rows = Manifest.load(prepared / part), np.array(rows_in(prepared / part))
        ends = rows == manifest.eos
        filler = int((ends[:, 1:] & ends[:, :-1]).sum()) + 1  # the look-ahead of the last row
        assert manifest.padding == report[part]["padding"] == filler
        assert manifest.tokens == report[part]["tokens"] == rows.size + 1
        assert manifest.tokens_per_chunk % ROW == 0 and manifest.packing.lengths == (ROW,)


def test_rows_are_read_whole_and_at_no_other_length(prepared: Path) -> None:
    kind = Manifest.load(prepared / "train").packing.kind
    stream = Stream([prepared / "train"], ROW, seed=1, shuffle=False)
    found = stream.read(np.arange(stream.samples_per_epoch))
    assert found[:, :-1].tolist() == rows_in(prepared / "train")
    eos, decode = stream.eos, stream.manifests[0].tokenizer().decode
    for number, row in enumerate(found[:8, :-1].tolist()):
        texts = [decode(part) for part in _parts(row, eos, kind)]
        assert stream.explain(number)["documents"] == texts, "filler is no document"
    stream.close()
    for length in (32, 128):
        with pytest.raises(UserError) as error:
            Stream([prepared / "train"], length, seed=1)
        assert f"holds rows of 64 tokens ({kind} 64), which are read whole, not in sequences of {length}" in str(
            error.value
        )
        assert f"--packing {kind} --seq-length {length}" in str(error.value)


def test_many_small_chunks_hold_whole_rows(corpus: Path, model_file: Path, tmp_path: Path) -> None:
    options = {"tokenizer": model_file, "validation": 0, "packing": "fit", "seq_length": 48}
    for chunk in (48, 480):
        quietly([corpus], tmp_path / str(chunk), tokens_per_chunk=chunk, chunks_per_shard=7, **options)
    quietly([corpus], tmp_path / "free", **options)
    read = [read_with_webdataset(tmp_path / name / "train") for name in ("48", "480", "free")]
    assert np.array_equal(read[0], read[1]) and np.array_equal(read[0], read[2])
    assert Manifest.load(tmp_path / "free" / "train").tokens_per_chunk == (1 << 14) // 48 * 48
    assert join([read[0]]).size > 48


def test_the_standard_library_leaves_less_than_a_hundredth_empty(model_file: Path, tmp_path: Path) -> None:
    for length in (256, 1024):
        texts = write_texts(tmp_path / f"texts{length}", stdlib_texts(60, 0, 30_000))
        report = quietly(
            [texts], tmp_path / f"{length}", tokenizer=model_file, validation=0, packing="fit", seq_length=length
        )
        part = report.parts["train"]
        assert 0 < part.padding < 0.01 * part.tokens


# -- mistakes ----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"packing": "fit"}, "--packing fit needs --seq-length"),
    (
        {"packing": "best", "seq_length": 8},
        "--packing best needs --seq-length, the tokens of a row, and is concat, fit or",
    ),
    ({"seq_length": 8}, "--seq-length has no effect without --packing fit or sentences"),
    ({"packing": "fit", "seq_length": 1}, "--seq-length must be 2 to 16,777,216 with --packing fit, not 1"),
    ({"packing": "sentences", "seq_length": 3}, "--seq-length must be 4 to 16,777,216 with --packing sentences, not 3"),
    (
        {"packing": "fit", "seq_length": 100, "tokens_per_chunk": 1024},
        "--tokens-per-chunk must be a multiple of a row's 100 tokens, such as 1,000, not 1,024",
    ),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=[case[1] for case in WRONG])
def test_mistakes_of_prepare(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        Options(**options).check()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_commands_options_reach_prepare_and_inspect_tells(corpus: Path, model_file: Path, tmp_path: Path) -> None:
    options = ("--tokenizer", model_file, "--validation", "0", "--processes", "1")
    ran = running.command(
        "prepare", corpus, *options, "--packing", "fit", "--seq-length", "48", "--out", tmp_path / "out"
    )
    assert ran.code == 0, ran.err
    manifest = Manifest.load(tmp_path / "out" / "train")
    share = f"{manifest.padding / manifest.tokens:.2%}"
    assert f"Of train's rows {share} is filler." in ran.out and str(manifest.packing) == "fit 48"
    told = running.command("inspect", tmp_path / "out" / "train")
    counted = re.search(r"padding *│ (\d+\.\d+)% of the tokens", told.out)
    assert re.search(r"packing *│ fit 48 ", told.out) and counted
    assert float(counted[1]) == pytest.approx(100 * manifest.padding / manifest.tokens, abs=0.01)
    sample = running.command("inspect", tmp_path / "out" / "train", "--sample", "0")
    assert sample.code == 0 and "document 1 of" in sample.out, "at the length of its rows"


def test_rows_that_do_not_fit_a_run_are_refused(prepared: Path, tmp_path: Path) -> None:
    config, kind = write_config(tmp_path, prepared), Manifest.load(prepared / "train").packing.kind
    ran = running.command("train", config)
    wrong = "which are read whole, not in sequences of 32" if kind == "fit" else "would learn these ends"
    running.assert_refused(ran, wrong)
