"""What a plan adds to reading and splitting, on several pieces and processes: selections, packing, formats of elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.manifest import Manifest
from pretrain.data.prepare import cluster_only, do_task, merge_only, plan_only, prepare
from pretrain.data.preparing.options import Options
from pretrain.errors import UserError
from pretrain.tokenization.foreign import load_tokenizer
from tests.launch.jobs import Slurm, launched
from tests.pretrain.data.corpus import documents_of, hashes, quietly, read_with_webdataset, stdlib_texts

SELECTION = """
version: 1
exact: {compare: normalized}
near: {threshold: 0.7}
length: {min_characters: 40}
"""


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of modules in six files; each file repeats some of the first one's, as they are and with a word changed."""
    folder = tmp_path_factory.mktemp("copies")
    texts = [text for module in stdlib_texts(24, 2_000, 9_000) for text in module.split("\n\n\n") if len(text) > 300]
    for number in range(6):
        own = [text for place, text in enumerate(texts) if place % 6 == number]
        repeated = [*texts[0:60:6], *(text.replace("self", "this", 1) for text in texts[6:60:6]), "short"]
        lines = [json.dumps({"text": text}) + "\n" for text in own + repeated * (number > 0)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def selection(tmp_path: Path) -> Path:
    path = tmp_path / "selection.yaml"
    path.write_text(SELECTION)
    return path


def wished(model_file: Path, **more: Any) -> dict[str, Any]:
    return {"tokenizer": model_file, "validation": 0.3, "tokens_per_chunk": 1024, "piece_bytes": 12_000, **more}


def test_copies_over_all_pieces_are_dropped_and_none_is_in_both_parts(
    copies: Path, selection: Path, model_file: Path, tmp_path: Path
) -> None:
    report = quietly([copies], tmp_path / "out", **wished(model_file, select=selection))
    tokenizer = load_tokenizer(model_file)
    found = {
        part: documents_of(read_with_webdataset(tmp_path / "out" / part), tokenizer) for part in ("train", "validation")
    }
    kept = found["train"] + found["validation"]
    assert len(kept) == len(set(kept)) and "short" not in kept
    assert report.dropped["exact duplicate"] >= 5 * 10 and sum(report.dropped.values()) + len(kept) == num_lines(copies)
    changed = {text.replace("self", "this", 1) for text in kept if "self" in text}
    assert not changed & set(kept), "a near copy of a document that is kept is dropped"
    assert report.parts["train"].documents == len(found["train"])
    value = json.loads((tmp_path / "out" / "report.json").read_text())
    assert value["dropped"] == report.dropped
    page = (tmp_path / "out" / "selection-report.html").read_text()
    assert "exact duplicate" in page and f"{num_lines(copies):,} documents" in page


def num_lines(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*.jsonl"))


def test_a_selection_is_the_same_from_processes_tasks_and_pieces(
    copies: Path, selection: Path, tmp_path: Path, model_file: Path
) -> None:
    """The tokenizer is trained behind the clusters, so that no copy is in its sample."""
    options = {**wished(model_file, select=selection), "tokenizer": None, "vocab_size": 420, "max_train_bytes": 30_000}
    quietly([copies], tmp_path / "one", **options)
    expected = hashes(tmp_path / "one")
    prepare([copies], tmp_path / "two", Options(**options), processes=2, say=silent)
    assert hashes(tmp_path / "two") == expected
    out = tmp_path / "tasks"
    plan_only([copies], out, Options(**options), processes=1, say=silent)
    with pytest.raises(UserError, match=r"looks for copies first: run tasks with --stage sign, then --cluster"):
        do_task(out, 0, 1, 1, silent)
    with pytest.raises(UserError, match=r"pieces of .* are not signed yet"):
        cluster_only(out, 1, silent)
    for task in (2, 0, 1, 0):
        do_task(out, task, 3, 1, silent, stage="sign")
    cluster_only(out, 1, silent)
    for task in (1, 0):
        do_task(out, task, 2, 1, silent)
    merge_only(out, 1, silent)
    assert hashes(out) == expected
    quietly([copies], tmp_path / "pieces", **{**options, "piece_bytes": 50_000})
    found = hashes(tmp_path / "pieces")
    names = ("selection-report.html", "report.json")  # of which examples say where a copy's first is: piece and place
    assert {name: digest for name, digest in found.items() if name not in names} == {
        name: digest for name, digest in expected.items() if name not in names
    }


def test_slurm_signs_clusters_encodes_and_merges(
    slurm: Slurm, copies: Path, selection: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan_only([copies], out, Options(**wished(model_file, select=selection)), processes=1, say=silent)
    assert launched("slurm", out, "--tasks", "3", "--time", "10", "--cpus", "1") == 0
    words = slurm.words("sbatch")
    scripts = [word.rpartition("/")[2] for word in words if word.endswith(".sh")]
    assert scripts == ["sign.sh", "cluster.sh", "encode.sh", "merge.sh"]
    after = [word for word in words if "dependency" in word]
    assert after == ["--dependency=afterok:41", "--dependency=afterok:42", "--dependency=afterok:43"]
    launch = tmp_path / ".out.preparing" / "launch"
    assert "--tasks 3 --stage sign" in (launch / "sign.sh").read_text()
    assert "#SBATCH --array=0-2" in (launch / "sign.sh").read_text()
    assert "--array" not in (launch / "cluster.sh").read_text()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path / "fake", monkeypatch)


def test_another_selection_is_refused(copies: Path, selection: Path, model_file: Path, tmp_path: Path) -> None:
    options = Options(**wished(model_file, select=selection))
    plan_only([copies], tmp_path / "out", options, processes=1, say=silent)
    selection.write_text(SELECTION.replace("40", "50"))
    with pytest.raises(UserError, match=r"selection\.yaml, or a file that it names, has changed since the work began"):
        do_task(tmp_path / "out", 0, 1, 1, silent, stage="sign")
    for _ in range(2):  # the plan is there as before
        with pytest.raises(UserError, match=r"other options: --select was [0-9a-f]+, and is [0-9a-f]+"):
            prepare([copies], tmp_path / "out", options, processes=1, say=silent)
    with pytest.raises(UserError, match="--stage sign: the plan compares no documents"):
        plan_only([copies], tmp_path / "plain", Options(**wished(model_file)), processes=1, say=silent)
        do_task(tmp_path / "plain", 0, 1, 1, silent, stage="sign")


@pytest.mark.parametrize(("packing", "length"), [("fit", 64), ("sentences", 48)])
def test_rows_are_packed_piece_by_piece_and_no_document_is_lost(
    copies: Path, model_file: Path, tmp_path: Path, packing: str, length: int
) -> None:
    options = wished(model_file, packing=packing, seq_length=length, tokens_per_chunk=length * 16)
    quietly([copies], tmp_path / "one", **options)
    prepare([copies], tmp_path / "two", Options(**options), processes=2, say=silent)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    texts = [json.loads(line)["text"] for path in copies.glob("*.jsonl") for line in path.read_text().splitlines()]
    tokenizer, size = load_tokenizer(model_file), 0
    for part in ("train", "validation"):
        manifest = Manifest.load(tmp_path / "one" / part)
        tokens = read_with_webdataset(tmp_path / "one" / part)
        assert (str(manifest.packing), manifest.tokens % length, len(tokens)) == (
            f"{packing} {length}",
            1,
            manifest.tokens,
        )
        size += int(np.sum(tokens != tokenizer.eos))
    assert size == sum(len(tokenizer.encode(text)) for text in texts)


def test_a_table_is_cut_at_its_row_groups_and_goes_where_its_name_says(tmp_path: Path, model_file: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = {
        part: [f"{part} {place}: {text[:400]}" for place, text in enumerate(stdlib_texts(40, 2_000, 12_000))]
        for part in ("train", "validation")
    }
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    for part, column in texts.items():
        table = pyarrow.table({"text": column})
        parquet.write_table(table, data / f"{part}-00000-of-00001.parquet", row_group_size=5)
    found = []
    for processes in (1, 2):
        out = tmp_path / f"out-{processes}"
        options = Options(tokenizer=model_file, validation=0.5, piece_bytes=1000)
        report = prepare([tmp_path / "set"], out, options, processes=processes, say=silent)
        found.append(hashes(out))
    tokenizer = load_tokenizer(model_file)
    for part, column in texts.items():
        assert documents_of(read_with_webdataset(tmp_path / "out-2" / part), tokenizer) == column
    assert found[0] == found[1] and report.skipped == {}
