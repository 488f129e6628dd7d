"""Pieces: documents of all pieces are those of the files, under the same names, wherever the files are cut."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.documents import Skipped, TextFile, read_documents, text_files
from pretrain.data.preparing import cutting, plan
from pretrain.data.preparing.options import Options
from pretrain.errors import UserError

LINES = st.lists(st.sampled_from(["", " \t", "a", "two words", "\u00e4" * 9, "\r", "x" * 60]), max_size=40)


def read_in_spans(path: Path, size: int, split: str) -> tuple[list[tuple[str, str]], Skipped, int]:
    file, skipped = TextFile(path, "name"), Skipped()
    spans = list(cutting.cut(file, path.stat().st_size, size, split))
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == path.stat().st_size
    found = read_documents(
        [TextFile(path, "name", span[:2], None, span.line) for span in spans], split, "text", skipped
    )
    return [(document.name, document.text) for document in found], skipped, len(spans)


@settings(max_examples=150, deadline=None)
@given(LINES, st.integers(1, 120), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_paragraphs_are_the_same_wherever_a_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int, end: str, last: bool
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes((end.join([*lines, "end"]) + end * last).encode())
    whole = read_documents([TextFile(path, "name")], "blank-line")
    assert read_in_spans(path, size, "blank-line")[0] == [(document.name, document.text) for document in whole]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["one", "", "tw\u00f6\n\nlines", None, "x" * 200]), max_size=30), st.integers(1, 300))
def test_lines_of_json_are_the_same_wherever_a_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], size: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_text(
        "".join("nothing\n" if text is None else json.dumps({"text": text}) + "\n" for text in [*texts, "z"])
    )
    skipped = Skipped()
    whole = [(one.name, one.text) for one in read_documents([TextFile(path, "name")], skipped=skipped)]
    found, skipped_too, _ = read_in_spans(path, size, "file")
    assert (found, skipped_too) == (whole, skipped)


def test_a_file_is_cut_near_each_multiple_and_never_inside_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 80}) + "\n"
    path.write_text(line * 1000)
    spans = list(cutting.cut(TextFile(path, "a"), path.stat().st_size, 10_000, "file"))
    assert len(spans) == -(-1000 * len(line) // 10_000)
    assert all(span.start % len(line) == 0 and span.line == span.start // len(line) for span in spans)
    assert all(0 <= span.start - 10_000 * number < len(line) for number, span in enumerate(spans))
    path.write_text(json.dumps({"text": "x" * 99_000}) + "\n" + line)  # one document larger than pieces
    assert [
        (span.start, span.line) for span in cutting.cut(TextFile(path, "a"), path.stat().st_size, 10_000, "file")
    ] == [
        (0, 0),
        (path.stat().st_size - len(line), 1),
    ]


def planned(tmp_path: Path, sizes: dict[str, int], **options: object) -> plan.Plan:
    folder = tmp_path / "texts"
    folder.mkdir(parents=True)
    for name, size in sizes.items():
        (folder / name).write_bytes(b"0123456789abcde\n" * (size // 16))
    (tmp_path / "work").mkdir()
    wished = Options(**options)  # type: ignore[arg-type]
    return plan.make(tmp_path / "work", text_files([folder]), wished, wished.deciding())


def test_small_files_come_together_and_each_file_is_in_one_place(tmp_path: Path) -> None:
    made = planned(tmp_path, {f"{n:03d}.txt": 160 for n in range(50)} | {"big.txt": 4800}, piece_bytes=1000)
    pieces = list(made)
    names = [Path(one.path).name for piece in pieces for one, _ in piece.spans]
    assert names == [*(f"{n:03d}.txt" for n in range(50)), "big.txt"]
    assert [len(piece.spans) for piece in pieces] == [6] * 8 + [2, 1]  # one document a file: the big one is not cut
    assert [made.piece(number) for number in range(made.pieces)] == pieces
    assert (made.files, made.bytes) == (51, 50 * 160 + 4800)
    cut = planned(tmp_path / "cut", {"big.txt": 4800}, piece_bytes=1000, split="blank-line")
    assert cut.pieces == 1, "a text without a blank line is one paragraph"


def test_a_corpus_is_cut_for_many_processes_whatever_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LEAST_BYTES", 100)
    monkeypatch.setattr(plan, "MOST_BYTES", 3200)
    for size, pieces in ((1600, 16), (16_000, 16), (160_000, 50)):
        made = planned(tmp_path / str(size), {f"{n:05d}.txt": 16 for n in range(size // 16)})
        assert pieces <= made.pieces <= pieces + 1


def test_what_is_not_as_planned_is_named(tmp_path: Path) -> None:
    options = {"piece_bytes": 1000}
    made = planned(tmp_path, {"a.txt": 160, "b.txt": 160}, **options)
    folder, deciding = tmp_path / "texts", Options(**options).deciding()  # type: ignore[arg-type]

    def refused(words: str, **changed: object) -> None:
        with pytest.raises(UserError, match=words):
            plan.check_same(made, text_files([folder]), {**deciding, **changed})

    plan.check_same(made, text_files([folder]), deciding)
    refused(r"other options: --validation was the default, and is 0\.5.*--restart", validation=0.5)
    refused("other options: --tokenizer was the default, and is abc", tokenizer="abc")
    (folder / "c.txt").write_text("more")
    refused("other texts: .*c.txt is new.*--restart")
    (folder / "c.txt").unlink()
    (folder / "b.txt").rename(folder / "0.txt")
    refused("other texts: .*0.txt stands where .*a.txt stood")
    (folder / "0.txt").unlink()
    refused("other texts: .*b.txt is missing")
    (folder / "b.txt").write_text("another")
    refused(r"b\.txt has changed since the work began: 160 bytes then, 7 now.*--restart")
    os.truncate(folder / "b.txt", 160)
    refused("b.txt has changed")
    with pytest.raises(UserError, match=r"b\.txt has changed"):
        made.piece(0).check()
    (folder / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.txt is gone since the work began\. Bring back"):
        made.piece(0).check()


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    made = planned(tmp_path, {"a.txt": 160})
    value = json.loads((made.work / plan.PLAN).read_text())
    (made.work / plan.PLAN).write_text(json.dumps({**value, "version": 99}))
    with pytest.raises(UserError, match="begun by another version of this program"):
        plan.Plan.open(made.work)
