from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.selection import clusters, sorting
from pretrain.data.selection.clusters import cluster, read_summary
from pretrain.data.selection.fates import fates_path, read_fates
from pretrain.data.selection.reasons import EXACT, KEPT, NEAR
from pretrain.data.selection.signatures import BLOCK, SignatureFile, Signatures, SignatureWriter
from pretrain.errors import UserError
from tests.pretrain.data.selection.making import changed, jaccard, judged, page, selection, signed

BOTH = {"exact": {}, "near": {}}


def rows(pieces: dict[int, list[str]], folder: Path, **options: object) -> dict[int, np.ndarray]:
    chosen = selection(**BOTH)
    folder.mkdir()
    files = {number: signed(chosen, texts, folder / f"{number}.sign") for number, texts in pieces.items()}
    cluster(files, folder / "fates", chosen.config, chosen.fingerprint, **options)  # type: ignore[arg-type]
    return {number: np.array(read_fates(fates_path(folder / "fates", number)).rows) for number in pieces}


def test_planted_copies_are_found_and_nothing_else(tmp_path: Path) -> None:
    """Exact ones all; of those with a Jaccard similarity of 0.85 or more 95%; of 300 unrelated texts below 1%."""
    originals = [page(number, 120 + number) for number in range(300)]
    exact = [originals[number].upper().replace(" ", "  ") for number in range(100)]
    near = [changed(originals[number], number, every=40 + number % 90) for number in range(100, 300)]
    close = [jaccard(originals[100 + place], text) >= 0.85 for place, text in enumerate(near)]
    assert sum(close) > 100
    pieces = [originals[:150], originals[150:] + exact[:50], near + exact[50:]]
    verdicts, summary = judged(selection(**BOTH), pieces, tmp_path / "all")
    reasons = [verdict.reason for verdict in verdicts]
    assert reasons[:300] == [""] * 300, "no original, since none is like an earlier one"
    assert reasons[300:350] == reasons[550:] == ["exact duplicate"] * 50
    found = [reason == "near duplicate" for reason, wanted in zip(reasons[350:550], close, strict=True) if wanted]
    assert sum(found) / len(found) >= 0.95
    assert summary.exact == 100 and summary.near == sum(reason == "near duplicate" for reason in reasons)
    assert sum(size * count for size, count in summary.sizes.items()) == 2 * (summary.exact + summary.near)


def test_a_copy_of_each_similarity_is_judged_by_the_threshold(tmp_path: Path) -> None:
    texts = [page(1, 400), changed(page(1, 400), 1, every=200), changed(page(1, 400), 2, every=10)]
    assert jaccard(*texts[:2]) > 0.9 and jaccard(texts[0], texts[2]) < 0.5
    for threshold, reasons in [(0.75, ["", "near duplicate", ""]), (1.0, ["", "", ""])]:
        verdicts, _ = judged(selection(near={"threshold": threshold}), [texts], tmp_path / str(threshold))
        assert [verdict.reason for verdict in verdicts] == reasons


def corpus() -> dict[int, list[str]]:
    """Pieces with copies within and across, chains of near copies, and an empty piece."""
    texts = [page(number, 150) for number in range(60)]
    texts += [changed(texts[number % 60], number, every=80) for number in range(120)]
    texts += [changed(texts[60 + number], 1000 + number, every=80) for number in range(60)] + texts[::7]
    order = sorted(range(len(texts)), key=lambda place: (place * 7919) % len(texts))
    mixed = [texts[place] for place in order]
    return {2: mixed[:100], 5: mixed[100:130], 6: [], 11: mixed[130:]}


def test_any_order_of_files_batches_and_memory_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = corpus()
    expected = rows(pieces, tmp_path / "one")
    monkeypatch.setattr(sorting, "LEAST_ROWS", 8)  # so that the files are merged in many blocks
    assert {number: len(found) for number, found in expected.items()} == {2: 100, 5: 30, 6: 0, 11: len(pieces[11])}
    kinds = np.concatenate(list(expected.values()))["reason"]
    assert min((kinds == reason).sum() for reason in (KEPT, EXACT, NEAR)) > 20
    backwards = dict(reversed(pieces.items()))
    for name, found in [
        ("backwards", rows(backwards, tmp_path / "two")),
        ("little", rows(pieces, tmp_path / "three", memory=2048)),
    ]:
        for number in pieces:
            assert np.array_equal(found[number], expected[number]), name


def test_a_cluster_is_its_smallest_document(tmp_path: Path) -> None:
    found = rows(corpus(), tmp_path / "one")
    rank = {number: place for place, number in enumerate(sorted(found))}
    for number, here in found.items():
        for place, row in enumerate(here):
            first = rank[int(row["piece"])], int(row["place"])
            assert first <= (rank[number], place)
            assert (first == (rank[number], place)) == (row["reason"] == KEPT)
            root = found[int(row["piece"])][int(row["place"])]
            assert root["reason"] == KEPT and (root["mark"] == row["mark"]).all()


def test_clusters_are_the_connected_parts_of_all_pairs(tmp_path: Path) -> None:
    """Against every pair compared by itself, where a pair shares a band and its signatures agree."""
    pieces = corpus()
    texts = [text for piece in pieces.values() for text in piece]
    chosen = selection(near={})
    found = chosen.sign(texts)
    bands = [(found.sketches.reshape(len(texts), 16, 8)[:, band] * 1) for band in range(16)]
    parent = list(range(len(texts)))

    def root(place: int) -> int:
        while parent[place] != place:
            place = parent[place]
        return place

    for one in range(len(texts)):
        for other in range(one + 1, len(texts)):
            shares = any((band[one] == band[other]).all() for band in bands)
            if shares and (found.sketches[one] == found.sketches[other]).mean() >= 0.75:
                a, b = root(one), root(other)
                parent[max(a, b)] = min(a, b)
    verdicts, _ = judged(chosen, list(pieces.values()), tmp_path / "all")
    assert [verdict.text is not None for verdict in verdicts] == [root(place) == place for place in range(len(texts))]


def test_documents_that_a_rule_drops_stand_for_nobody(tmp_path: Path) -> None:
    text = page(1, 100)
    short = " ".join(text.split()[:-1])
    chosen = selection(near={}, length={"min_words": 100})
    verdicts, _ = judged(chosen, [[short, text, text + " more"]], tmp_path / "all")
    assert [verdict.reason for verdict in verdicts] == ["words", "", "near duplicate"]
    assert verdicts[0].detail == "words 99, at least 100 wanted"


def test_kept_copies_share_the_mark_that_chooses_their_part(tmp_path: Path) -> None:
    texts = [page(1), page(2), changed(page(1), 1, 150), page(1), changed(page(2), 1, 150)]
    verdicts, summary = judged(selection(exact={}, near={"drop": False}), [texts[:2], texts[2:]], tmp_path / "all")
    assert [verdict.reason for verdict in verdicts] == ["", "", "", "exact duplicate", ""]
    marks = [verdict.mark for verdict in verdicts]
    assert marks[0] == marks[2] == marks[3] != marks[1] == marks[4]
    assert (summary.exact, summary.near, summary.sizes) == (1, 2, {2: 1, 3: 1})
    assert [verdict.copies for verdict in verdicts] == [3, 2, 1, 1, 1]


def write_signatures(path: Path, sketches: np.ndarray, first: int = 0) -> Path:
    """Of documents of which all but the signatures does not matter."""
    chosen, count = selection(near={}), len(sketches)
    with SignatureWriter(path, chosen.fingerprint, chosen.config.near) as writer:
        for begin in range(0, count, 5000):
            part = sketches[begin : begin + 5000]
            numbers = np.arange(first + begin, first + begin + len(part), dtype=np.uint64)
            exact, nothing = np.column_stack([numbers, numbers]), np.zeros(len(part))
            writer.add(Signatures(exact, nothing.astype("u1"), nothing, part, np.zeros((0, 48), np.int64)))
    return path


def distinct(count: int, first: int = 0) -> np.ndarray:
    numbers = np.arange(first, first + count, dtype=np.uint32)
    return numbers[:, None] * np.uint32(2654435761) + np.arange(128, dtype=np.uint32)


def test_a_file_of_signatures_gives_back_what_was_written(tmp_path: Path) -> None:
    sketches = distinct(2 * BLOCK + 100)
    chosen = selection(near={})
    file = SignatureFile(write_signatures(tmp_path / "s", sketches), chosen.fingerprint)
    assert file.documents == len(sketches)
    places = [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK, 2 * BLOCK + 99]
    assert np.array_equal(file.sketches_of(places), sketches[places])
    assert file.exact_of(places)[:, 1].tolist() == places
    assert np.concatenate(list(file.exact()))[:, 0].tolist() == list(range(len(sketches)))
    assert [len(keys) for keys in file.band(15)] == [BLOCK, BLOCK, 100]
    assert len(set(np.concatenate(list(file.band(3))).tolist())) == len(sketches)


@pytest.mark.parametrize("harm", ["cut", "empty", "other", "longer"])
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path: Path, harm: str) -> None:
    chosen = selection(near={})
    path = write_signatures(tmp_path / "piece-7", distinct(10))
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-5], "empty": b"", "other": data, "longer": b"x" + data}[harm])
    fingerprint = "another" if harm == "other" else chosen.fingerprint
    with pytest.raises(UserError, match=r"piece-7.*remove"):
        cluster({0: path}, tmp_path / "out", chosen.config, fingerprint)
    assert read_summary(tmp_path / "out") is None
    assert list((tmp_path / "out").iterdir()) == []


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    chosen = selection(near={})
    with pytest.raises(RuntimeError), SignatureWriter(tmp_path / "s", chosen.fingerprint, chosen.config.near) as writer:
        writer.add(chosen.sign(["a"]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_all_share_costs_no_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 documents agree in one band and nowhere else: each is compared with eight at most."""
    sketches = distinct(20_000)
    sketches[:, :8] = 7
    compared = []
    plain = clusters._are_copies

    def counted(corpus: object, pairs: np.ndarray, threshold: float) -> np.ndarray:
        compared.append(len(pairs))
        return plain(corpus, pairs, threshold)  # type: ignore[arg-type]

    monkeypatch.setattr(clusters, "_are_copies", counted)
    chosen = selection(near={})
    path = write_signatures(tmp_path / "s", sketches)
    summary = cluster({0: path}, tmp_path / "out", chosen.config, chosen.fingerprint, memory=4 << 20)
    assert summary.near == 0 and 20_000 < sum(compared) < 20_000 * (clusters.LEADERS + 1)


def test_all_copies_of_one_are_one_cluster_in_any_blocks(tmp_path: Path) -> None:
    sketches = np.concatenate(
        [np.repeat(distinct(1), 3000, axis=0), distinct(500, 10), np.repeat(distinct(1), 3000, axis=0)]
    )
    chosen = selection(near={})
    path = write_signatures(tmp_path / "s", sketches)
    summary = cluster({0: path}, tmp_path / "out", chosen.config, chosen.fingerprint, memory=1 << 16)
    assert summary.sizes == {6000: 1} and summary.near == 5999
    assert read_summary(tmp_path / "out") == summary


def _peak(path: Path, out: Path, memory: int) -> None:
    chosen = selection(near={})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cluster({0: path}, out, chosen.config, chosen.fingerprint, memory)
    (out / "peak").write_text(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10))


def test_memory_is_bounded_whatever_the_number_of_documents(tmp_path: Path) -> None:
    """Of 60,000 documents with 41 MB of signatures and 15 MB of band keys, in 4 MB; a document has 13 bytes in mapped files."""
    peaks = []
    for count in (15_000, 60_000):
        out = tmp_path / str(count)
        path = write_signatures(tmp_path / f"{count}.sign", distinct(count))
        process = multiprocessing.get_context("spawn").Process(target=_peak, args=(path, out, 4 << 20))
        process.start()
        process.join(120)
        peaks.append(int((out / "peak").read_text()))
    assert peaks[1] - peaks[0] < 45_000 * 13 + (6 << 20)
