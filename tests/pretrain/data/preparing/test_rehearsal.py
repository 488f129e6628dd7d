"""`prepare --dry-run`: what it expects is what comes, the same each time, and nothing is written."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from pretrain.data.documents import text_files
from pretrain.data.prepare import rehearse
from pretrain.data.preparing import rehearsal
from pretrain.data.preparing.options import Options
from pretrain.errors import UserError
from pretrain.tokenization.foreign import load_tokenizer
from tests.distributed import run_python
from tests.pretrain.data.corpus import hashes, quietly, stdlib_texts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of lines, one of paragraphs, small files, and what cannot be read: 700 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"{n} {text}" for n in range(4) for text in stdlib_texts(30, 2_000, 9_000)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:60]) + "nothing\n")
    (folder / "b.txt").write_text("\n\n".join(text.replace("\n\n", "\n") for text in texts[60:]))
    (folder / "c.txt").write_bytes(b"binary\0")
    return folder


def test_of_the_whole_corpus_it_tells_what_prepare_does(corpus: Path, model_file: Path, tmp_path: Path) -> None:
    options = Options(
        tokenizer=model_file, validation=0.3, split="blank-line", tokens_per_chunk=8192, chunks_per_shard=4
    )
    lines = list(rehearse([corpus], options, processes=2, count=10_000))
    report = quietly([corpus], tmp_path / "out", **vars(options))
    total = sum(part.documents for part in report.parts.values())
    assert f"{total:,} documents" in lines[0] and f"  {total:,} kept (100.0%)" in lines[1]
    for name, part in report.parts.items():
        shards = len(list((tmp_path / "out" / name).glob("*.tar")))
        assert f"{part.documents:,} {name}" in lines[1]
        assert any(f"{name}: {part.tokens:,} tokens, {shards} shard" in line for line in lines)
    assert any(line.endswith("1 not a JSON object, such as " + f"{corpus}/a.jsonl:61") for line in lines)
    assert any("binary (holds a zero byte)" in line for line in lines)


def test_a_part_of_a_corpus_stands_for_it(
    corpus: Path, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "RANGE", 20_000)
    options = Options(tokenizer=model_file, validation=0.3, split="blank-line")
    tokenizer = load_tokenizer(model_file)
    found = [rehearsal.rehearse(text_files([corpus]), options, tokenizer, None, count) for count in (30, 30, 10_000)]
    assert 30 <= found[0].documents < 60 and found[0].read_bytes < 0.5 * found[0].bytes
    assert vars(found[0]) | {"seconds": 0, "skipped": 0} == vars(found[1]) | {"seconds": 0, "skipped": 0}
    expected, whole = (sum(one.tokens.values()) * one.scale for one in (found[0], found[2]))
    assert found[2].scale == 1 and abs(expected / whole - 1) < 0.15


def test_a_selection_and_a_tokenizer_that_is_still_to_train(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "selection.yaml"
    path.write_text("version: 1\nexact: {compare: normalized}\nlength: {min_characters: 3000}\n")
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text((corpus / "b.txt").read_text()[:9000])
    lines = list(rehearse([tmp_path / "texts"], Options(select=path, validation=0), processes=1))
    assert "  1 kept (33.3%): 1 train, 0 validation" in lines
    assert any("2 not selected: exact duplicate, such as" in line for line in lines)
    assert any(re.search(r"train: [1-9][\d,]* tokens, 1 shard", line) for line in lines)
    assert any("Copies were looked for in the sample alone" in line for line in lines)


def test_of_a_large_compressed_file_only_the_beginning_is_read(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "MOST_OF_A_FILE", 50)
    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(1000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = rehearsal.rehearse(text_files([tmp_path]), Options(), load_tokenizer(model_file), None, 2000)
    assert (found.documents, found.left_out, found.scale) == (50, 1, 0)
    assert "nothing is known of the whole" in list(rehearsal.lines_of(found, Options(), 1))[-1]


def test_the_command_prints_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    before = hashes(corpus)
    words = ["pretrain", "prepare", corpus, "--out", tmp_path / "out", "--dry-run", "--sample", "20"]
    result = run_python(words)
    assert result.returncode == 0 and "Expected of the whole" in result.stdout, result.stderr
    assert list(tmp_path.iterdir()) == [] and hashes(corpus) == before
    for more, message in (
        (["--plan"], "--dry-run and --plan are different parts"),
        (["--pairs"], "--pairs are prepared in one go: leave out --dry-run"),
    ):
        refused = run_python([*words, *more])
        assert refused.returncode == 2 and message in refused.stderr
    refused = run_python([*words[:5], "--sample", "20"])
    assert refused.returncode == 2 and "--sample: has no effect without --dry-run" in refused.stderr
    with pytest.raises(UserError, match="- cannot be sampled"):
        list(rehearse(["-"], Options()))
