"""Folders as Hugging Face lays them out: each file goes where its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.data.documents import Skipped, read_documents, text_files
from pretrain.data.foreign.kinds import part_of_name


@pytest.mark.parametrize(
    ("inner", "part"),
    [
        ("data/train-00000-of-00010.parquet", "train"),
        ("data/validation-00000-of-00001.jsonl.gz", "validation"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("train.jsonl", "train"),
        ("dev.jsonl.zst", "validation"),
        ("Valid/0000.parquet", "validation"),
        ("data/test/0.jsonl", "test"),
        ("train-000123.tar", "train"),
        ("val-0001.tar.gz", "validation"),
        ("a/data/test/0.jsonl", None),
        ("other/train/0.jsonl", None),
        ("contest.jsonl", None),
        ("train-of-thought.jsonl", None),
        ("test/main.py", None),
        ("train.txt", None),
        ("00001.jsonl", None),
    ],
)
def test_a_files_part_is_in_its_name(inner: str, part: str | None) -> None:
    assert part_of_name(inner) == part


def test_each_split_of_a_folder_goes_where_its_name_says_and_the_test_split_nowhere(tmp_path: Path) -> None:
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001", "more"]
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / f"data/{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    (tmp_path / "README.md").write_text("about it")
    skipped = Skipped(strict=True)
    found = {document.text: document.part for document in read_documents(text_files([tmp_path]), skipped=skipped)}
    assert found == {names[0]: "train", names[1]: "train", names[2]: "validation", "more": None, "about it": None}
    assert skipped.examples == {
        "file of a test split (name the file itself to take it)": [f"{tmp_path}/data/{names[3]}.jsonl"]
    }
    named = list(read_documents(text_files([tmp_path / f"data/{names[3]}.jsonl"])))
    assert [(document.text, document.part) for document in named] == [(names[3], None)]
