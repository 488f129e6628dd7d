"""`prepare --pairs`: every pair once, whole and with its own, in rows that the objective takes apart again."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config.objective import ObjectiveConfig
from pretrain.data.manifest import Manifest
from pretrain.data.pairs import TOO_LONG, Lengths, prepare_pairs
from pretrain.data.preparing.options import Options, Report
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.objectives.pairs import SequenceToSequence
from tests.pretrain import running
from tests.pretrain.data.corpus import hashes
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
    """What training reads, taken apart by the objective's own document numbers."""
    stream = Stream([folder], sum(lengths), seed=1, shuffle=False)
    tokenizer = stream.manifests[0].tokenizer()
    objective = SequenceToSequence(
        ObjectiveConfig(kind="sequence-to-sequence", source_length=lengths.source), stream.eos, 1
    )
    numbers = np.arange(stream.samples_per_epoch)
    batch = objective(torch.from_numpy(numbers), torch.from_numpy(stream.read(numbers)))
    found = []
    assert batch.documents is not None
    for inputs, targets, documents, mask in zip(*batch[:2], batch.documents, batch.mask, strict=True):
        of_source, of_target = documents.split(list(lengths))
        for number in range(int(of_target[mask > 0].max()) + 1):
            source = inputs[: lengths.source][of_source == number].tolist()
            target = targets[(of_target == number) & (mask > 0)].tolist()
            assert source[-1] == target[-1] == stream.eos
            found.append((tokenizer.decode(source[:-1]), tokenizer.decode(target[:-1])))
    stream.close()
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    prepared(folder / "out", write_table(folder / "pairs.tsv", lines()))
    return folder / "out"


def test_every_pair_once_and_in_order(shards: Path) -> None:
    train, held_out = pairs_of(shards / "train"), pairs_of(shards / "validation")
    assert 20 < len(held_out) < 70 and not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(lines())
    order = {pair: number for number, pair in enumerate(lines())}
    assert [order[pair] for pair in train] == sorted(order[pair] for pair in train)


def test_rows_are_full(shards: Path) -> None:
    """A row ends because the next pair does not fit, so hardly a side is emptier than a pair is long."""
    manifest = Manifest.load(shards / "train")
    assert manifest.pairs == LENGTHS and manifest.documents == len(pairs_of(shards / "train"))
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
    assert pairs_of(tmp_path / "out" / "train", lengths) == lines(300)


MISTAKES = [
    ("one\ttwo\nthree\n", (), ["pairs.tsv:2:"]),
    ("one\ttwo\nthree\t \n", (), ["pairs.tsv:2:", "has no target"]),
    ("source\ttarget\none\ttwo\n", (), ["pairs.tsv:1:", "a header where none is expected"]),
    ("", (), ["pairs.tsv:1:", "empty"]),
    ("one\ttwo\n", ("--stdlib",), ["--stdlib is text, not pairs"]),
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
    import json
    import shutil

    from pretrain.data.manifest import canonical

    shutil.copytree(shards / "train", tmp_path / "old")
    path = tmp_path / "old" / "manifest.json"
    path.write_bytes(canonical({**json.loads(path.read_bytes()), "version": 2}))
    with pytest.raises(UserError, match="its packing is not known"):
        Manifest.load(tmp_path / "old")
