"""`prepare --pairs`: every pair once, whole and with its own, in rows that the objective takes apart again."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config.objective import ObjectiveConfig
from pretrain.data import pairs as packed
from pretrain.data.manifest import Manifest
from pretrain.data.pairs import TOO_LONG, Lengths, best_fit, prepare_pairs
from pretrain.data.preparing.options import Options, Report
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.objectives.pairs import SequenceToSequence
from tests.pretrain import running
from tests.pretrain.data.corpus import hashes
from tests.pretrain.formats import MANIFEST_WRITERS
from tests.training import write_config

LENGTHS = Lengths(40, 24)
OPTIONS = Options(vocab_size=290, validation=0.1)


def lines(count: int = 400) -> list[tuple[str, str]]:
    draw = random.Random(3)
    words = [["ab", "cd", "ef", "gh"][draw.randrange(4)] for _ in range(12 * count)]
    pairs = [words[12 * n : 12 * n + draw.randrange(1, 8)] for n in range(count)]
    return [(f"{n} {' '.join(pair)}", " ".join(reversed(pair))) for n, pair in enumerate(pairs)]


def write_table(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    return path


def prepared(out: Path, *files: Path, lengths: Lengths = LENGTHS, processes: int = 1) -> Report:
    return prepare_pairs(files, out, lengths, OPTIONS, processes, say=lambda _: None)


def pairs_of(folder: Path, lengths: Lengths = LENGTHS) -> list[tuple[str, str]]:
    return [pair for row in rows_of(folder, lengths) for pair in row]


def rows_of(folder: Path, lengths: Lengths = LENGTHS) -> list[list[tuple[str, str]]]:
    """What training reads, taken apart by the objective's own document numbers."""
    stream = Stream([folder], sum(lengths), seed=1, shuffle=False)
    tokenizer = stream.manifests[0].tokenizer()
    objective = SequenceToSequence(
        ObjectiveConfig(kind="sequence-to-sequence", source_length=lengths.source), stream.eos, 1
    )
    numbers = np.arange(stream.samples_per_epoch)
    batch = objective(torch.from_numpy(numbers), torch.from_numpy(stream.read(numbers)))
    found: list[list[tuple[str, str]]] = []
    assert batch.documents is not None
    for inputs, targets, documents, mask in zip(*batch[:2], batch.documents, batch.mask, strict=True):
        of_source, of_target = documents.split(list(lengths))
        found.append([])
        for number in range(int(of_target[mask > 0].max()) + 1):
            source = inputs[: lengths.source][of_source == number].tolist()
            target = targets[(of_target == number) & (mask > 0)].tolist()
            assert source[-1] == target[-1] == stream.eos
            found[-1].append((tokenizer.decode(source[:-1]), tokenizer.decode(target[:-1])))
    stream.close()
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    prepared(folder / "out", write_table(folder / "pairs.tsv", lines()))
    return folder / "out"


def test_every_pair_once_and_rows_in_the_order_of_their_first_pairs(shards: Path) -> None:
    train, held_out = pairs_of(shards / "train"), pairs_of(shards / "validation")
    assert 20 < len(held_out) < 70 and not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(lines())
    order = {pair: number for number, pair in enumerate(lines())}
    rows = [[order[pair] for pair in row] for row in rows_of(shards / "train")]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows) and all(row == sorted(row) for row in rows)
    numbers = [number for row in rows for number in row]
    assert numbers != sorted(numbers), "a later pair fills what is left of a row"


def test_rows_are_full(shards: Path) -> None:
    """Of the side that fills them first; rows in the file's order leave a sixth of it empty."""
    manifest, found = Manifest.load(shards / "train"), pairs_of(shards / "train")
    assert str(manifest.packing) == "fit-pairs 40 24" and manifest.documents == len(found)
    tokenizer = manifest.tokenizer()
    sizes = np.array([[len(tokenizer.encode(side)) + 1 for side in pair] for pair in lines() if pair in set(found)])
    assert manifest.tokens - manifest.padding == sizes.sum(), "padding is what no pair has"
    least = sizes.sum(axis=0) / LENGTHS  # rows that the fuller side needs
    assert least.max() / len(rows_of(shards / "train")) > 0.95
    assert least.max() / rows_in_order(sizes, LENGTHS) < 0.84


def rows_in_order(sizes: np.ndarray, lengths: Lengths) -> int:
    """How many rows there are if each is closed when the next pair does not fit."""
    rows, room = 0, np.zeros(2)
    for pair in sizes:
        if (room < pair).any():
            rows, room = rows + 1, np.array(lengths)
        room = room - pair
    return rows


def test_best_fit_is_the_plain_algorithm() -> None:
    draw = random.Random(5)
    for _ in range(50):
        lengths = Lengths(draw.randrange(4, 30), draw.randrange(4, 30))
        sizes = np.array([[draw.randrange(2, length + 1) for length in lengths] for _ in range(draw.randrange(1, 60))])
        found, room = best_fit(sizes, lengths), {}
        for pair in sorted(range(len(sizes)), key=lambda pair: -max(sizes[pair] * lengths[::-1])):
            able = [row for row in room if (room[row] >= sizes[pair]).all()]
            row = min(able, key=lambda row: (room[row] * lengths[::-1]).sum(), default=len(room))
            room[row] = room.get(row, np.array(lengths)) - sizes[pair]
            assert found[pair] == row


def test_rows_hold(shards: Path) -> None:
    manifest = Manifest.load(shards / "train")
    assert manifest.pairs == LENGTHS
    assert manifest.tokens_per_chunk % sum(LENGTHS) == 0
    assert manifest.tokens == Stream([shards / "train"], sum(LENGTHS), seed=1).samples_per_epoch * sum(LENGTHS) + 1


def test_two_files_and_processes_give_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    for side in (0, 1):
        (tmp_path / f"side{side}").write_text("".join(f"{pair[side]}\n" for pair in lines()))
    prepared(tmp_path / "out", tmp_path / "side0", tmp_path / "side1", processes=2)
    assert hashes(tmp_path / "out") == hashes(shards)


def test_what_fits_no_row_is_counted(tmp_path: Path) -> None:
    pairs = [*lines(60), ("a " * 50, "b"), ("a", "b " * 30)]
    report = prepared(tmp_path / "out", table := write_table(tmp_path / "pairs.tsv", pairs))
    assert report.skipped == {TOO_LONG: 2} and report.examples[TOO_LONG] == [f"{table}:61", f"{table}:62"]
    assert len(pairs_of(tmp_path / "out" / "train") + pairs_of(tmp_path / "out" / "validation")) == 60


def test_many_chunks(tmp_path: Path) -> None:
    """Rows do not lie across chunks, whatever their length."""
    lengths = Lengths(37, 22)
    table = write_table(tmp_path / "pairs.tsv", lines(300))
    options = Options(vocab_size=290, validation=0.0, tokens_per_chunk=3 * 59)
    prepare_pairs([table], tmp_path / "out", lengths, options, say=lambda _: None)
    assert Manifest.load(tmp_path / "out" / "train").chunks > 3
    assert sorted(pairs_of(tmp_path / "out" / "train", lengths)) == sorted(lines(300))


def test_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is packed by itself: pairs stay inside it."""
    monkeypatch.setattr(packed, "BLOCK", 50)
    options = Options(vocab_size=290, validation=0.0)
    prepare_pairs(
        [write_table(tmp_path / "pairs.tsv", lines(300))], tmp_path / "out", LENGTHS, options, say=lambda _: None
    )
    found = pairs_of(tmp_path / "out" / "train")
    for first in range(0, 300, 50):
        assert sorted(found[first : first + 50]) == sorted(lines(300)[first : first + 50])


def test_rows_in_the_order_of_the_file_are_read_as_before(shards: Path, tmp_path: Path) -> None:
    """A folder of an older version says that its rows are, and gives the same pairs."""
    shutil.copytree(shards, tmp_path / "old")
    MANIFEST_WRITERS[3](tmp_path / "old" / "train")
    old = Manifest.load(tmp_path / "old" / "train")
    assert (str(old.packing), old.version, old.pairs) == ("pairs 40 24", 3, LENGTHS)
    assert pairs_of(tmp_path / "old" / "train") == pairs_of(shards / "train")


def test_chunks_hold_whole_rows(tmp_path: Path) -> None:
    table = write_table(tmp_path / "pairs.tsv", lines(30))
    ran = running.command("prepare", table, "--pairs", "--tokens-per-chunk", "1000", "--out", tmp_path / "out")
    running.assert_refused(ran, "a multiple of a row's 256 tokens, such as 768, not 1,000")


MISTAKES = [
    ("one\ttwo\nthree\n", (), ["pairs.tsv:2:"]),
    ("one\ttwo\nthree\t \n", (), ["pairs.tsv:2:", "has no target"]),
    ("source\ttarget\none\ttwo\n", (), ["pairs.tsv:1:", "a header where none is expected"]),
    ("", (), ["pairs.tsv:1:", "empty"]),
    ("one\ttwo\n", ("--stdlib",), ["--stdlib is text, not pairs"]),
    ("one\ttwo\n", ("--packing", "fit", "--seq-length", "64"), ["--packing and --seq-length are of text"]),
    ("one\ttwo\n", ("--source-length", "1"), ["must be at least 2"]),
    ("one\ttwo\n", ("pairs.tsv", "pairs.tsv"), ["one table of two columns, or two files"]),
]


@pytest.mark.parametrize(("text", "more", "words"), MISTAKES, ids=[" ".join(case[2]) for case in MISTAKES])
def test_mistakes(tmp_path: Path, text: str, more: tuple[str, ...], words: list[str]) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(text)
    more = tuple(str(path) if name == "pairs.tsv" else name for name in more)
    ran = running.command("prepare", path, *more, "--pairs", "--out", tmp_path / "out")
    running.assert_refused(ran, *words)
    assert not (tmp_path / "out").exists()


def test_lengths_are_of_pairs_alone(tmp_path: Path) -> None:
    ran = running.command("prepare", "--stdlib", "--source-length", "64", "--out", tmp_path / "out")
    running.assert_refused(ran, "are of the rows that --pairs makes")


PAIRS = ("model.kind=encoder-decoder", "objective={kind: sequence-to-sequence}", "data.validation=null")
PAIRS += ("monitor.validate_every=null",)


def test_shards_that_are_not_of_the_objective(shards: Path, tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    lengths = ("data.seq_length=64", "objective.source_length=40")
    for data, options, words in (
        (tiny_data, PAIRS, ["holds text, but", "pretrain prepare --pairs"]),
        (shards, (), ["holds pairs, but objective.kind: causal", "sequence-to-sequence"]),
        (shards, (*PAIRS, "data.seq_length=32"), ["40 tokens of sources and 24 of targets", *lengths]),
    ):
        ran = running.command("train", config, f"data.train={data / 'train'}", *options)
        running.assert_refused(ran, *words)


def test_a_manifest_of_a_former_version_has_no_pairs(shards: Path, tmp_path: Path) -> None:
    from pretrain.data.manifest import canonical

    shutil.copytree(shards / "train", tmp_path / "old")
    path = tmp_path / "old" / "manifest.json"
    path.write_bytes(canonical({**json.loads(path.read_bytes()), "version": 2}))
    with pytest.raises(UserError, match="its packing is not known"):
        Manifest.load(tmp_path / "old")
