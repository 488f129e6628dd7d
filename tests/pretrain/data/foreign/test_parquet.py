"""Parquet tables: every compression and type of text, cut by row groups, damaged, and made to unpack without end."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from pretrain.data.documents import Document, Skipped, TextFile, pieces_of, read_documents, text_files
from pretrain.data.foreign import parquet as module
from pretrain.data.foreign.pages import BadPage, largest_page
from pretrain.errors import UserError
from tests.pretrain.data.corpus import ODD, stdlib_texts


def write(path: Path, column: Any, name: str = "text", **options: Any) -> Path:
    parquet.write_table(pa.table({"id": list(range(len(column))), name: column}), path, **options)
    return path


def read(path: Path, field: str = "text") -> tuple[list[Document], Skipped]:
    skipped = Skipped()
    return list(read_documents(text_files([path]), "file", field, skipped)), skipped


def texts(path: Path, field: str = "text") -> list[str]:
    found, skipped = read(path, field)
    assert skipped.counts == {}
    return [document.text for document in found]


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_texts_come_back_whatever_the_compression(tmp_path: Path, compression: str, version: str) -> None:
    wanted = [*ODD, *stdlib_texts(5)]
    path = write(tmp_path / "a.parquet", wanted, compression=compression, data_page_version=version)
    assert texts(path) == wanted
    assert [document.name for document in read(path)[0]][:2] == [f"{path}:1", f"{path}:2"]


PLAIN: dict[str, Any] = {"use_dictionary": False}
ENCODINGS: list[dict[str, Any]] = [{}, PLAIN, {**PLAIN, "column_encoding": "DELTA_BYTE_ARRAY"}]
STRINGS = [pa.string(), pa.large_string(), pa.binary(), pa.string_view()]


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, options) for kind in STRINGS for options in ENCODINGS), (pa.dictionary(pa.int32(), pa.string()), {})],
    ids=str,
)
def test_every_type_and_encoding_of_text_is_read(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    wanted = stdlib_texts(6) * 2
    parquet.write_table(pa.table({"text": pa.array(wanted).cast(kind)}), tmp_path / "a.parquet", **options)
    assert texts(tmp_path / "a.parquet") == wanted


def test_a_column_inside_a_struct_is_named_with_dots(tmp_path: Path) -> None:
    rows = [
        {"a": {"b": "one", "c": 1}, "text": "other"},
        {"a": None, "text": "x"},
        {"a": {"b": "two", "c": 2}, "text": "y"},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found, skipped = read(tmp_path / "a.parquet", "a.b")
    assert [document.text for document in found] == ["one", "two"]
    assert skipped.counts == {"without a text field 'a.b'": 1}


def test_nulls_and_empty_texts_are_skipped_and_bytes_must_be_text(tmp_path: Path) -> None:
    found, skipped = read(write(tmp_path / "a.parquet", pa.array(["a", None, " ", "b"])))
    assert [document.text for document in found] == ["a", "b"]
    assert skipped.examples == {
        "without a text field 'text'": [f"{tmp_path}/a.parquet:2"],
        "empty": [f"{tmp_path}/a.parquet:3"],
    }
    found, skipped = read(write(tmp_path / "b.parquet", pa.array([b"a", b"\xff", b"c\0"], pa.binary())))
    assert [document.text for document in found] == ["a"]
    assert skipped.counts == {"not UTF-8 text": 1, "binary (holds a zero byte)": 1}


def test_strings_that_are_no_utf8_are_skipped_alone(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff\xfe"], pa.binary()).buffers())
    found, skipped = read(write(tmp_path / "a.parquet", column))
    assert [document.text for document in found] == ["good"] and sum(skipped.counts.values()) == 1


def test_pieces_are_row_groups_and_give_the_documents_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 4_000)
    wanted = [f"{number} " + "words " * (number % 97) for number in range(1000)]
    path = write(tmp_path / "a.parquet", wanted, row_group_size=7)
    [file] = text_files([path])
    pieces = pieces_of(file)
    assert len(pieces) > 10 and all(piece.span is not None for piece in pieces)
    found = [document for piece in pieces for document in read_documents([piece])]
    assert found == read(path)[0] and [document.text for document in found] == wanted
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    assert pieces_of(TextFile(broken, "b")) == [TextFile(broken, "b")]


def test_a_column_that_is_missing_or_not_of_texts_is_the_users_to_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["x"], name="body")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value) == f"{path} has no column 'text'; it has 'id', 'body': name one by --text-field."
    with pytest.raises(UserError, match="its column 'id' is not of texts: name another by --text-field"):
        read(path, "id")
    parquet.write_table(pa.table({"text": [["a", "b"]]}), path)
    with pytest.raises(UserError, match=r"its column 'text.list.element' is not of texts"):
        read(path, "text.list.element")


def test_without_pyarrow_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"Parquet files need pyarrow; install it: pip install 'pretrain-engine\[data\]'"
    ):
        read(path)


@pytest.mark.parametrize("cut", [0, 3, 8, 11, 400, -1, -4, -8, -300])
def test_a_cut_file_is_skipped_whole(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.parquet", stdlib_texts(2))
    path.write_bytes(path.read_bytes()[:cut])
    assert read(path)[0] == [] and sum(read(path)[1].counts.values()) == 1


def test_bytes_that_were_altered_are_skipped_as_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", stdlib_texts(2), compression="snappy")
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # of the first column's page, which is not read
    data[300:500] = b"\xff" * 200
    path.write_bytes(data)
    assert read(path)[1].counts == {"a damaged Parquet file": 1}


def test_a_page_of_an_unknown_kind_is_damage_not_passed_over(tmp_path: Path) -> None:
    """pyarrow leaves such a page's rows out without a word."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": stdlib_texts(4)}), path, use_dictionary=False, row_group_size=2)
    data = bytearray(path.read_bytes())
    assert data[4:6] == b"\x15\x00"  # the first field of the first page's header: its kind
    data[5] = 2
    path.write_bytes(data)
    found, skipped = read(path)
    assert found == [] and skipped.counts == {"a damaged Parquet file": 1}


def test_rows_that_are_missing_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", stdlib_texts(4))
    table = module.Table
    monkeypatch.setattr(table, "_values", lambda self, batch: ["all that is left"])
    found, skipped = read(path)
    assert len(found) == 1 and skipped.counts == {"a Parquet file with other rows than it declares": 1}


def test_a_dictionarys_text_in_many_rows_is_never_in_memory_at_once(tmp_path: Path) -> None:
    """800 bytes that say 10 GB: a text of 10 MB, a thousand times."""
    text = pa.array(["a" * 10_000_000]).dictionary_encode()
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": text.take(pa.array([0] * 1000))}), path, compression="zstd")
    assert path.stat().st_size < 1_000
    before, begin = pa.total_allocated_bytes(), time.process_time()
    documents = read_documents(text_files([path]), skipped=(skipped := Skipped()))
    peak, count = 0, 0
    for _ in documents:
        peak, count = max(peak, pa.total_allocated_bytes() - before), count + 1
    assert skipped.counts == {"a Parquet file that unpacks to more than 1,000 times its size": 1}
    assert count * 10_000_000 <= module.BOMB_BYTES
    assert peak < 2 * module.MAX_BATCH_BYTES and time.process_time() - begin < 3


def test_endless_rows_of_nothing_end_early(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.nulls(8_000_000, pa.string())}), path, compression="zstd")
    begin = time.process_time()
    skipped = read(path)[1]
    assert skipped.counts["a Parquet file that unpacks to more than 1,000 times its size"] == 1
    assert skipped.counts["without a text field 'text'"] <= module.BOMB_BYTES // module.ROW_BYTES
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("limit", ["MAX_PAGE_BYTES", "MAX_GROUP_BYTES"])
def test_pages_and_row_groups_that_declare_too_much_are_not_unpacked(
    tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, limit, 1 << 20)
    path = write(tmp_path / "a.parquet", ["a" * (2 << 20)], compression="zstd")
    found, skipped = read(path)
    [reason] = skipped.counts
    assert found == [] and reason.startswith("a Parquet file with a ")


def test_the_largest_page_is_found_in_the_headers(tmp_path: Path) -> None:
    wanted = ["x" * size for size in (10, 20_000, 300)] * 50
    path = write(
        tmp_path / "a.parquet",
        wanted,
        compression="zstd",
        use_dictionary=False,
        data_page_size=1 << 14,
        write_batch_size=10,
    )
    data = path.read_bytes()
    chunk = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    found = largest_page(
        lambda place, count: data[place : place + count], chunk.data_page_offset, chunk.total_compressed_size
    )
    assert 20_000 < found < chunk.total_uncompressed_size / 10
    for wrong in (-1, 1, -chunk.total_compressed_size + 3):
        with pytest.raises(BadPage):
            largest_page(
                lambda place, count: data[place : place + count],
                chunk.data_page_offset,
                chunk.total_compressed_size + wrong,
            )


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x15",
        b"\x15\x00" + b"\xff" * 20,
        b"\x1c" * 100,
        b"\x19\xfc" + b"\xff" * 9 + b"\x7f",
        b"\x00",
        b"\x15\x00\x15\x01\x15\x01\x00",
    ],
)
def test_a_pages_header_that_is_none_is_refused(header: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(BadPage):
        largest_page(lambda place, count: header[place : place + count], 0, max(len(header), 1))
    assert time.process_time() - begin < 1
