"""Text to shards: the same bytes however it is run, every document back as it was, a split that moves nobody."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard

from pretrain.data.prepare import prepare
from pretrain.data.preparing.options import Options
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.tokenization.foreign import load_tokenizer
from pretrain.tokenization.training import train_tokenizer
from tests.pretrain.data.corpus import (
    ODD,
    documents_of,
    hashes,
    quietly,
    read_with_tarfile,
    read_with_webdataset,
    stdlib_texts,
    write_texts,
)

TEXTS = [*stdlib_texts(), *ODD, *(f"note {n}: {'word ' * (n % 7)}\nend" for n in range(60))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("corpus") / "texts", TEXTS)


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with a tokenizer trained on it; a fifth is validation."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    quietly([corpus], out, vocab_size=420, validation=0.2, tokens_per_chunk=1024, max_train_bytes=30_000)
    return out


def all_documents(out: Path) -> dict[str, list[str]]:
    """Texts of each part, by a stock webdataset reader and the tokenizer beside the shards."""
    return {
        part.name: documents_of(read_with_webdataset(part), load_tokenizer(part / "tokenizer.model"))
        for part in sorted(out.iterdir())
        if part.is_dir()
    }


def report_of(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    return value


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_bytes_are_the_same_for_any_number_of_processes_and_on_a_second_run(
    corpus: Path, prepared: Path, tmp_path: Path, processes: int
) -> None:
    options = {"vocab_size": 420, "validation": 0.2, "tokens_per_chunk": 1024, "max_train_bytes": 30_000}
    quietly([corpus], tmp_path / "out", processes, **options)
    assert hashes(tmp_path / "out") == hashes(prepared)
    assert len(hashes(prepared)) == 9  # a report; of both parts manifest, tokenizer, shard and its hashes


def test_batches_of_many_documents_keep_their_order(tmp_path: Path, model_file: Path) -> None:
    """More documents than go to a process at once, of which the first batch takes longest."""
    lines = [f"{n} " + "x" * (200 if n < 900 else 1) for n in range(3000)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for processes in (1, 3):
        quietly([path], tmp_path / str(processes), processes, tokenizer=model_file, validation=0)
    assert hashes(tmp_path / "1") == hashes(tmp_path / "3")
    assert all_documents(tmp_path / "3")["train"] == lines


def test_every_document_decodes_to_itself_in_the_order_of_the_corpus(prepared: Path) -> None:
    found = all_documents(prepared)
    assert Counter(found["train"] + found["validation"]) == Counter(TEXTS)
    for texts in found.values():
        assert texts == [text for text in TEXTS if text in set(texts)]
    for part in ("train", "validation"):
        assert np.array_equal(read_with_tarfile(prepared / part), read_with_webdataset(prepared / part))
    assert report_of(prepared)["altered"] == 0


def test_the_report_and_the_manifests_count_what_was_written(prepared: Path) -> None:
    report, found = report_of(prepared), all_documents(prepared)
    for part, texts in found.items():
        size = sum(len(text.encode()) for text in texts)
        tokens = len(read_with_tarfile(prepared / part))
        counts = {"documents": len(texts), "tokens": tokens, "text_bytes": size, "padding": 0}
        assert report["parts"][part] == counts
        manifest = json.loads((prepared / part / "manifest.json").read_bytes())
        assert {name: manifest[name] for name in counts} == counts
    assert (report["vocab_size"], report["skipped"]) == (420, {})


def test_a_document_with_sentencepieces_own_space_mark_is_counted_as_altered(tmp_path: Path, model_file: Path) -> None:
    texts = write_texts(tmp_path / "texts", ["plain", "a\u2581b", "plain again"])
    report = quietly([texts], tmp_path / "out", tokenizer=model_file, validation=0)
    assert (report.altered, report.altered_examples) == (1, [f"{texts}/0001.txt"])
    assert all_documents(tmp_path / "out")["train"] == ["plain", "a b", "plain again"]


def test_a_vocabulary_above_65536_takes_four_bytes(tmp_path: Path, model_file: Path, corpus: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto.FromString(model_file.read_bytes())
    for number in range(70_000 - len(model.pieces)):
        model.pieces.add(piece=f"\ue000{number}", score=-1e6)
    model.trainer_spec.vocab_size = 70_000
    big = tmp_path / "big.model"
    big.write_bytes(model.SerializeToString())
    extra = write_texts(tmp_path / "extra", ["\ue00069000"])
    quietly([corpus, extra], tmp_path / "out", tokenizer=big, validation=0, tokens_per_chunk=1024)
    assert json.loads((tmp_path / "out/train/manifest.json").read_bytes())["dtype"] == "uint32"
    tokens = read_with_webdataset(tmp_path / "out/train")
    assert tokens.max() > 65_535
    assert documents_of(tokens, load_tokenizer(big)) == [*TEXTS, "\ue00069000"]
    stream = Stream([tmp_path / "out/train"], 16, seed=1, shuffle=False)
    assert np.array_equal(stream.read(np.arange(3))[:, :-1].ravel(), tokens[:48])


# -- formats of text -------------------------------------------------------------------------------------------------


def test_all_formats_of_the_same_documents_give_the_same_shards(tmp_path: Path, model_file: Path) -> None:
    texts = [text for text in TEXTS if text.strip("\r\n") == text and "\n\n" not in text and "\r" not in text]
    lines = "".join(json.dumps({"content": text, "text": 1}) + "\n" for text in texts).encode()
    files = {
        "lines.jsonl": lines,
        "lines.jsonl.gz": gzip.compress(lines),
        "lines.jsonl.zst": zstandard.compress(lines),
        "paragraphs.txt": "\n\n\n".join(texts).encode(),
        "paragraphs.md.gz": gzip.compress("\n\n".join(texts).encode()),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    sources = {"folder": write_texts(tmp_path / "folder", texts), **{name: tmp_path / name for name in files}}
    found = []
    for name, path in sources.items():
        out, split = tmp_path / f"out-{name}", "blank-line" if name.startswith("paragraphs") else "file"
        report = quietly([path], out, tokenizer=model_file, validation=0.3, split=split, text_field="content")
        assert (report.skipped, report.altered) == ({}, 0)
        found.append(hashes(out))
    assert all(files == found[0] for files in found)


def test_a_given_tokenizer_travels_with_the_shards_unchanged(tmp_path: Path, model_file: Path, corpus: Path) -> None:
    quietly([corpus], tmp_path / "out", tokenizer=model_file, validation=0.3)
    for part in ("train", "validation"):
        assert (tmp_path / "out" / part / "tokenizer.model").read_bytes() == model_file.read_bytes()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_user_symbols_are_one_token_in_both_kinds_of_tokenizer(tmp_path: Path, model_type: str) -> None:
    texts = [f"{text}<tool>call</tool>\n" for text in stdlib_texts()]
    folder = write_texts(tmp_path / "texts", texts)
    options = {"vocab_size": 420, "model_type": model_type, "user_symbols": ("<tool>", "</tool>")}
    report = quietly([folder], tmp_path / "out", **options, validation=0, max_train_bytes=30_000)
    tokenizer = load_tokenizer(tmp_path / "out/train/tokenizer.model")
    ids = [tokenizer.encode(symbol) for symbol in ("<tool>", "</tool>", "\n", "\t")]
    assert [len(found) for found in ids] == [1, 1, 1, 1]
    tokens = read_with_webdataset(tmp_path / "out/train")
    assert [np.sum(tokens == found[0]) for found in ids[:2]] == [len(texts)] * 2
    assert documents_of(tokens, tokenizer) == texts and report.altered == 0


# -- the split -------------------------------------------------------------------------------------------------------


def test_the_split_goes_by_the_documents_hash(prepared: Path) -> None:
    held_out = {text for text in TEXTS if xxhash.xxh64_intdigest(text.encode(), seed=0x5EED) < 0.2 * 2**64}
    found = all_documents(prepared)
    assert set(found["validation"]) == held_out and held_out.isdisjoint(found["train"])
    assert 0.1 < len(held_out) / len(set(TEXTS)) < 0.3


def test_copies_fall_on_one_side_and_more_documents_move_nobody(
    tmp_path: Path, model_file: Path, prepared: Path
) -> None:
    before = all_documents(prepared)
    more = write_texts(tmp_path / "more", [f"new {n}" for n in range(100)] + TEXTS[::-1] + TEXTS[:30])
    quietly([more], tmp_path / "out", tokenizer=model_file, validation=0.2)
    after = all_documents(tmp_path / "out")
    for part in ("train", "validation"):
        assert set(before[part]) == set(after[part]) & set(TEXTS)
    assert set(after["train"]).isdisjoint(after["validation"])
    quietly([more], tmp_path / "seeded", tokenizer=model_file, validation=0.2, seed=1)
    assert set(all_documents(tmp_path / "seeded")["validation"]) != set(after["validation"])


def test_a_larger_share_keeps_whom_a_smaller_held_out(tmp_path: Path, model_file: Path, corpus: Path) -> None:
    sets = []
    for share in (0.1, 0.3, 0.6):
        quietly([corpus], tmp_path / str(share), tokenizer=model_file, validation=share)
        sets.append(set(all_documents(tmp_path / str(share))["validation"]))
    assert sets[0] < sets[1] < sets[2]


def test_the_tokenizer_sees_no_validation_document(prepared: Path) -> None:
    train = all_documents(prepared)["train"]
    assert train_tokenizer(train, 420, max_bytes=30_000).sha256 == report_of(prepared)["tokenizer_sha256"]


def test_without_validation_there_is_no_folder_for_it(tmp_path: Path, model_file: Path, corpus: Path) -> None:
    report = quietly([corpus], tmp_path / "out", tokenizer=model_file, validation=0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "train"]
    assert report.parts["train"].documents == len(TEXTS)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation": 1.0}, "--validation is a share from 0 to below 1, not 1.0"),
        ({"validation": float("nan")}, "--validation is a share"),
        ({"tokens_per_chunk": 0}, "--tokens-per-chunk must be 1 to 16,777,216, not 0"),
        ({"vocab_size": 5, "tokenizer": "x"}, "--vocab-size .* or --tokenizer .*, not both"),
        ({"chunks_per_shard": 0}, "at least one chunk"),
        ({"vocab_size": 0}, "at least 1"),
        ({"vocab_size": 20}, "A vocabulary of 20 is too small for the characters of this text: at least [0-9]+"),
        ({"vocab_size": 50_000}, "A vocabulary of 50000 is larger than this text supports: the largest .* is [0-9]+"),
        ({"user_symbols": ("</s>",)}, "'</s>' cannot be a user symbol"),
        ({"tokenizer": "/none.model"}, "Cannot read the tokenizer /none.model"),
        ({"validation": 1e-9}, "Of 80 documents none fell to validation: split the text into more documents"),
    ],
)
def test_options_that_cannot_be_are_refused_and_leave_nothing(
    corpus: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        quietly([corpus], tmp_path / "out", **{"max_train_bytes": 10_000, **options})
    assert list(tmp_path.iterdir()) == []


def test_all_wrong_options_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Options(validation=2, tokens_per_chunk=-1, chunks_per_shard=0).check()
    assert len(str(error.value).splitlines()) == 3


def test_the_largest_vocabulary_that_is_named_works(corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options = Options(max_train_bytes=2_000, validation=0)
    report = prepare([corpus], tmp_path / "out", options, processes=1, say=said.append)
    assert f"The text is small: its vocabulary is {report.vocab_size} in place of 8192" in said
    assert report.altered == 0
    with pytest.raises(UserError, match=f"the largest that works is {report.vocab_size}"):
        quietly([corpus], tmp_path / "more", vocab_size=report.vocab_size + 1, max_train_bytes=2_000, validation=0)


def test_processes_and_no_text_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--processes must be at least 1, not 0"):
        quietly([tmp_path], tmp_path / "out", processes=0)
    with pytest.raises(UserError, match="There is no text to prepare"):
        quietly([], tmp_path / "out")
