"""`prepare` of files made elsewhere: the same documents give the same shards, whatever they lay in."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from pretrain.data.documents import text_files
from pretrain.errors import UserError
from tests.distributed import run_python
from tests.pretrain.data.corpus import hashes, quietly, stdlib_texts, write_texts
from tests.pretrain.data.foreign import test_megatron
from tests.pretrain.data.foreign.tars import packed


def test_the_same_documents_give_the_same_shards_whatever_they_lay_in(tmp_path: Path, model_file: Path) -> None:
    texts = stdlib_texts(8)
    write_texts(tmp_path / "text", texts)
    for name in ("tar", "table", "lines"):
        (tmp_path / name / "data").mkdir(parents=True)
    members = [(f"{number:04d}.txt", text.encode()) for number, text in enumerate(texts)]
    (tmp_path / "tar/data/0.tar").write_bytes(packed(members[:3]))
    (tmp_path / "tar/data/1.tar").write_bytes(packed(members[3:]))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "table/data/0.parquet", row_group_size=3)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "lines/data/0.jsonl").write_text(lines)
    for name in ("text", "tar", "table", "lines"):
        report = quietly([tmp_path / name], tmp_path / f"out-{name}", tokenizer=model_file, validation=0.3)
        assert report.skipped == {}
    for part in ("train", "validation"):
        [wanted, *others] = [hashes(tmp_path / f"out-{name}" / part) for name in ("text", "tar", "table", "lines")]
        assert len(wanted) == 4 and others == [wanted] * 3


def test_the_command_tells_what_it_left_out_of_foreign_files(tmp_path: Path, model_file: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-0.tar").write_bytes(packed([("a.txt", b"one text"), ("a.pkl", b"x"), ("../b.txt", b"two")]))
    parquet.write_table(pa.table({"text": ["a test"]}), tmp_path / "data/test-00000-of-00001.parquet")
    arguments = [
        "prepare",
        tmp_path / "data",
        "--out",
        tmp_path / "out",
        "--tokenizer",
        model_file,
        "--validation",
        "0",
    ]
    result = run_python(["pretrain", *arguments, "--processes", "1"])
    assert result.returncode == 0, result.stderr
    for words in (
        "1 a member that only a program could decode (pickle, torch, CBOR): never opened, such as",
        "1 a member name that leads out of its folder, such as",
        "1 file of a test split (name the file itself to take it), such as",
    ):
        assert words in result.stdout


def test_the_names_that_megatron_users_type_find_the_index(tmp_path: Path) -> None:
    index = test_megatron.write(tmp_path, [[[60, 7]]])
    (tmp_path / "more.bin").write_bytes(b"")
    for name in ("d", "d.bin", "d.idx", ""):
        assert [file.path for file in text_files([tmp_path / name])] == [index]
    index.with_suffix(".bin").unlink()
    assert text_files([tmp_path]) == []
    with pytest.raises(UserError, match="There is no file or folder"):
        text_files([tmp_path / "none"])
