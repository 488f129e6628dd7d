"""Megatron-LM's .bin and .idx: as megatron-core writes them, as the layout is documented, and damaged."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.documents import Document, Skipped, pieces_of, read_documents, text_files
from pretrain.data.foreign import megatron
from pretrain.errors import UserError
from pretrain.tokenization.base import Tokenizer
from tests.pretrain.data.corpus import stdlib_texts

Sentences = Sequence[Sequence[Sequence[int]]]  # ids of each sentence of each document


def write(folder: Path, documents: Sentences, dtype: str = "<i4", code: int = 4, modes: bool = False) -> Path:
    """The two files by hand, after the layout that megatron-core documents."""
    sequences = [sentence for document in documents for sentence in document]
    lengths = np.array([len(sentence) for sentence in sequences], "<i4")
    size = np.dtype(dtype).itemsize
    places = np.cumsum([0, *(lengths[:-1].astype("<i8") * size)], dtype="<i8")[: len(lengths)]
    firsts = np.cumsum([0, *(len(document) for document in documents)], dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts))
    parts = [header, lengths.tobytes(), places.tobytes(), firsts.tobytes(), bytes(len(sequences) * modes)]
    (folder / "d.idx").write_bytes(b"".join(parts))
    (folder / "d.bin").write_bytes(b"".join(np.array(sentence, dtype).tobytes() for sentence in sequences))
    return folder / "d.idx"


def read(path: Path, tokenizer: Tokenizer | None, eos_id: int | None = None) -> list[Document]:
    skipped = Skipped()
    found = list(read_documents(text_files([path]), skipped=skipped, tokenizer=tokenizer, eos_id=eos_id))
    assert skipped.counts == {}
    return found


def ids_of(documents: list[Document]) -> list[list[int]]:
    return [document.tokens.tolist() for document in documents if document.tokens is not None]


def refusal(path: Path, tokenizer: Tokenizer | None, eos_id: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        read(path, tokenizer, eos_id)
    return str(error.value)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_what_megatron_core_writes_is_read(tmp_path: Path, tokenizer: Tokenizer, dtype: type[np.number[Any]]) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d_text_document.bin"), dtype=dtype)
    texts = stdlib_texts(4)
    encoded = [tokenizer.encode(text) for text in texts]
    for ids in encoded:
        builder.add_document(torch.tensor([*ids, tokenizer.eos]), [len(ids) - 7, 8])
    builder.finalize(str(tmp_path / "d_text_document.idx"))
    for name in ("d_text_document.idx", "d_text_document.bin", "d_text_document", ""):
        found = read(tmp_path / name, tokenizer)
        assert ids_of(found) == encoded and [document.text for document in found] == texts
    assert found[1].name == f"{tmp_path}/d_text_document.idx:2"
    assert found[0].tokens is not None and found[0].tokens.dtype == np.dtype("<u2")


def test_an_end_that_is_constant_or_named_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, [[[60, 61], [62, 7]], [[63, 7]], [[64, 65, 7]]])
    assert ids_of(read(path, tokenizer)) == [[60, 61, 62], [63], [64, 65]]
    assert ids_of(read(path, tokenizer, eos_id=7)) == [[60, 61, 62], [63], [64, 65]]
    assert ids_of(read(path, tokenizer, eos_id=megatron.NO_END)) == [[60, 61, 62, 7], [63, 7], [64, 65, 7]]


def test_where_it_is_not_known_what_ends_a_document_it_has_to_be_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for documents in ([[[60, 61]], [[62, 63]]], [[[60, 61]]]):
        path = write(tmp_path, documents)
        assert "its documents do not all end in one id: name by --eos-id the id that ends" in refusal(path, tokenizer)
        assert len(read(path, tokenizer, eos_id=megatron.NO_END)) == len(documents)


def test_an_id_that_only_seems_to_end_documents_cuts_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, [[[60, 7]], [[61, 7, 62, 7]]])
    assert f"{path}:2: most documents end in the id 7, but this one does not, or has it inside too" in refusal(
        path, tokenizer
    )


def test_the_end_is_looked_for_in_some_documents_and_checked_in_all(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "LOOKED_AT", 2)
    path = write(tmp_path, [[[60, 7]], [[61, 8]], [[62, 7]], [[63, 7]]])
    assert f"{path}:2: most documents end in the id 7" in refusal(path, tokenizer)


def test_pieces_give_the_documents_of_the_whole(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "PIECE_BYTES", 40)
    monkeypatch.setattr(megatron, "WINDOW", 3)
    documents = [[[60 + number] * (number % 5 + 1), [99, 7]] for number in range(17)]
    [file] = text_files([write(tmp_path, documents)])
    pieces = pieces_of(file)
    assert len(pieces) > 4
    found = [document for piece in pieces for document in read_documents([piece], tokenizer=tokenizer)]
    assert found == read(file.path, tokenizer)
    assert ids_of(found) == [[*first, 99] for first, _ in documents]


def test_the_tokenizer_must_be_named_and_have_the_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, [[[60, 400, tokenizer.eos]]])
    assert refusal(path, None) == f"{path} holds tokens: name by --tokenizer the tokenizer that they were made with."
    assert f"{path}:1 holds the id 400, and the tokenizer's ids are 0 to 399: name by --tokenizer" in refusal(
        path, tokenizer
    )
    path = write(tmp_path, [[[60, -1, tokenizer.eos]]])
    assert "holds the id -1" in refusal(path, tokenizer)


def test_empty_documents_and_too_long_ones_are_skipped(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "MAX_TOKENS", 5)
    path = write(tmp_path, [[[60] * 9 + [7]], [], [[]], [[61, 7]]])
    skipped = Skipped()
    found = list(read_documents(text_files([path]), skipped=skipped, tokenizer=tokenizer, eos_id=7))
    assert ids_of(found) == [[61]]
    assert skipped.counts == {"a document of more than 5 tokens": 1, "empty": 2}


def patched(start: int, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[start : start + len(data)] = data
        path.write_bytes(raw)

    return change


def integer(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little", signed=True)


# 4 sequences of 2 ids in 2 documents: header 34, lengths at 34, places at 50, firsts at 82, end at 106
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another magic": (patched(0, b"M2"), "is not an index of Megatron-LM's"),
    "cut in the header": (lambda path: os.truncate(path, 20), "is not an index of Megatron-LM's"),
    "empty": (lambda path: os.truncate(path, 0), "is not an index of Megatron-LM's"),
    "version 2": (patched(9, b"\2"), "has version 2; this program reads version 1"),
    "fractions": (patched(17, b"\7"), "holds numbers with a fraction, not ids"),
    "an unknown type": (patched(17, b"\x63"), "holds ids of an unknown type (99)"),
    "2^63 sequences": (patched(18, b"\xff" * 7 + b"\x7f"), "its size is not that of what it declares"),
    "2^64 documents": (patched(26, b"\xff" * 8), "its size is not that of what it declares"),
    "no documents": (patched(26, integer(0)), "its size is not that of what it declares"),
    "cut short": (lambda path: os.truncate(path, 100), "its size is not that of what it declares"),
    "a negative length": (patched(34, integer(-1, 4)), "its sequences do not lie one behind the other"),
    "a huge length": (patched(34, integer(2**31 - 1, 4)), "its sequences do not lie one behind the other"),
    "a place outside": (patched(50, integer(-8)), "its sequences do not lie one behind the other"),
    "a place of 2^63": (patched(58, integer(2**63 - 1)), "its sequences do not lie one behind the other"),
    "documents backwards": (patched(90, integer(2**40)), "its documents are not in order"),
    "a negative document": (patched(90, integer(-5)), "its documents are not in order"),
    "an overflow of differences": (
        patched(82, integer(2**63 - 1) + integer(-(2**63))),
        "its documents are not in order",
    ),
    "a late first document": (patched(82, integer(1)), "it has sequences that belong to no document"),
    "an early last document": (patched(98, integer(3)), "it has sequences that belong to no document"),
    "ids cut short": (lambda path: os.truncate(path.with_suffix(".bin"), 28), "do not lie one behind the other"),
    "half an id": (lambda path: os.truncate(path.with_suffix(".bin"), 30), "its size is not that of what it declares"),
    "no ids": (lambda path: path.with_suffix(".bin").unlink(), "Documents of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_refused(tmp_path: Path, tokenizer: Tokenizer, damage: str) -> None:
    path = write(tmp_path, [[[60, 61], [62, 7]], [[63, 64], [65, 7]]])
    assert path.stat().st_size == 106 and len(read(path, tokenizer)) == 2
    change, words = DAMAGE[damage]
    change(path)
    assert re.search(re.escape(words), message := refusal(path, tokenizer)), message
    assert str(path) in message or str(path.with_suffix(".bin")) in message


def test_a_multimodal_index_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, [[[60, 61]], [[62]]], modes=True)
    assert f"{path} is of a multimodal data set (a mode of each sequence); only text is read." == refusal(
        path, tokenizer
    )


def test_a_pipe_in_place_of_ids_does_not_block(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, [[[60, 7]]])
    path.with_suffix(".bin").unlink()
    os.mkfifo(path.with_suffix(".bin"))
    assert str(path) in refusal(path, tokenizer)
