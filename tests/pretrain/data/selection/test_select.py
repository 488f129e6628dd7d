from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.prepare import Options, part_of
from pretrain.data.selection.clusters import cluster
from pretrain.data.selection.fates import fates_path, read_fates
from pretrain.data.selection.select import Selection, Verdict
from pretrain.data.selection.tally import Tally
from pretrain.errors import UserError
from tests.pretrain.data.selection.making import changed, jaccard, judged, page, selection, signed

RULES: dict[str, Any] = {
    "gopher_quality": {},
    "gopher_repetition": {},
    "c4": {"curly_brackets": False},
    "length": {"max_words": 1000},
}
MENU = "Home | About\n"


def mixed(count: int = 60) -> list[str]:
    """Good pages, some with a menu that goes, and bad ones of each kind, with copies of all."""
    texts: list[str] = []
    for number in range(count):
        text = page(number, 80)
        kind = number % 6
        texts.append(
            [text, MENU + text, "short", "# " * 60 + text, text + "\nbuy the of now " * 40, text.upper()][kind]
        )
    return texts + texts[::5] + [changed(text, 3, every=60) for text in texts[::7]]


def told(verdicts: list[Verdict]) -> list[tuple[Any, ...]]:
    return [(*verdict[:5], verdict.copies) for verdict in verdicts]


def test_each_document_is_kept_or_has_one_reason_and_the_sums_are_right(tmp_path: Path) -> None:
    chosen, texts = selection(**RULES, exact={}, near={}), mixed()
    verdicts, summary = judged(chosen, [texts[:30], texts[30:]], tmp_path / "all")
    tally = Tally()
    tally.count([str(number) for number in range(len(texts))], texts, verdicts)
    assert (tally.read, tally.bytes_read) == (len(texts), sum(len(text.encode()) for text in texts))
    assert tally.kept + sum(count for count, _ in tally.dropped.values()) == tally.read
    assert tally.kept == sum(verdict.text is not None for verdict in verdicts) > 10
    assert tally.bytes_kept == sum(len((verdict.text or "").encode()) for verdict in verdicts)
    assert sum(size for _, size in tally.dropped.values()) == sum(
        len(text.encode()) for text, verdict in zip(texts, verdicts, strict=True) if verdict.text is None
    )
    assert set(tally.dropped) <= set(chosen.reasons) and len(tally.dropped) >= 5
    assert tally.dropped["exact duplicate"][0] == summary.exact >= 12
    for verdict in verdicts:
        assert (verdict.text is None) == bool(verdict.reason) == bool(verdict.detail)


def test_reasons_come_in_the_order_of_the_steps(tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text(page(3, 80))
    chosen = selection(**RULES, exact={}, near={}, contamination={"files": [str(questions)]})
    texts = [
        page(1),
        "short",
        "SHORT",
        changed(page(1), 1, 150),
        page(3, 80),
        changed(page(3, 80), 1, 60),
        page(2) + "\n{",
    ]
    verdicts, _ = judged(chosen, [texts], tmp_path / "all")
    assert [verdict.reason for verdict in verdicts] == [
        "",
        "Gopher: words",
        "exact duplicate",
        "near duplicate",
        "contamination",
        "near duplicate",
        "",
    ]
    assert chosen.reasons[0] == "exact duplicate"
    assert chosen.reasons[-3:] == ["near duplicate", "quality", "contamination"]


def test_signed_and_judged_is_as_judged_at_once_but_for_copies(tmp_path: Path) -> None:
    texts = mixed()
    alone = selection(**RULES).judge(texts)
    both, summary = judged(selection(**RULES, exact={}, near={}), [texts], tmp_path / "all")
    for one, other in zip(alone, both, strict=True):
        if other.reason not in ("exact duplicate", "near duplicate"):
            assert (one.text, one.reason, one.detail, one.changed) == (
                other.text,
                other.reason,
                other.detail,
                other.changed,
            )
    tally = Tally()
    tally.count(texts, texts, alone)
    assert tally.histograms == summary.histograms
    assert sum(tally.histograms[0]) == len(texts), "the first rule looked at all"


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_batches_do_not_matter(batch: int, tmp_path: Path) -> None:
    texts = mixed()
    chosen = selection(**RULES, exact={}, near={})
    one, first = judged(chosen, [texts[:25], texts[25:]], tmp_path / "one", batch=7)
    other, second = judged(chosen, [texts[:25], texts[25:]], tmp_path / "other", batch=batch)
    assert told(one) == told(other) and first == second


def _sign(job: tuple[int, list[str], Path]) -> tuple[int, Path]:
    number, texts, folder = job
    return number, signed(selection(**RULES, exact={}, near={}), texts, folder / f"{number}.sign")


def _judge(job: tuple[int, list[str], Path]) -> tuple[list[Any], dict[str, Any]]:
    number, texts, folder = job
    verdicts = selection(**RULES, exact={}, near={}).judge(texts, read_fates(fates_path(folder / "fates", number)))
    tally = Tally()
    tally.count([f"{number}:{place}" for place in range(len(texts))], texts, verdicts)
    return told(verdicts), json.loads(json.dumps(tally.to_json()))


def test_any_number_of_processes_and_order_of_pieces_gives_the_same(tmp_path: Path) -> None:
    """One process and piece after piece; three processes, the pieces and their tallies backwards."""
    texts, results = mixed(), []
    pieces = [texts[first : first + 13] for first in range(0, len(texts), 13)]
    chosen = selection(**RULES, exact={}, near={})
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        jobs = [(number, piece, folder) for number, piece in enumerate(pieces)]
        jobs = jobs if processes == 1 else jobs[::-1]
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            files = dict(pool.map(_sign, jobs, chunksize=1) if processes > 1 else map(_sign, jobs))
            summary = cluster(files, folder / "fates", chosen.config, chosen.fingerprint)
            judged = pool.map(_judge, jobs, chunksize=1) if processes > 1 else list(map(_judge, jobs))
        total = Tally()
        for _, tally in judged:
            total.add(Tally.from_json(tally))
        ordered = [verdict for verdicts, _ in (judged if processes == 1 else judged[::-1]) for verdict in verdicts]
        bytes_written = [path.read_bytes() for path in sorted((folder / "fates").iterdir())]
        results.append((ordered, summary, total.to_json(), bytes_written))
    assert results[0] == results[1]


@pytest.mark.parametrize("drop", [True, False])
def test_near_copies_of_validation_documents_are_not_trained_on(drop: bool, tmp_path: Path) -> None:
    """Whether copies are dropped, or kept and told apart by their cluster's mark alone."""
    texts = [page(number, 150) for number in range(80)]
    texts += [changed(texts[number], number, every=100) for number in range(80)]
    verdicts, _ = judged(selection(exact={}, near={"drop": drop}), [texts[:50], texts[50:]], tmp_path / "all")
    options = Options(validation=0.3)
    parts = {"train": [], "validation": []}  # type: dict[str, list[str]]
    for verdict in verdicts:
        if verdict.text is not None:
            parts[part_of(verdict.mark, options)].append(verdict.text)
    assert len(parts["validation"]) > 10 and len(parts["train"]) > 40
    assert len(parts["train"]) + len(parts["validation"]) == (80 if drop else 160)
    for held in parts["validation"]:
        assert max(jaccard(held, text) for text in parts["train"]) < 0.5


def test_a_mark_without_copies_is_of_the_text_alone() -> None:
    chosen = selection(**RULES)
    one, other = chosen.judge([page(1), page(2)])
    assert chosen.judge([page(2)])[0].mark == other.mark != one.mark and len(one.mark) == 16


@pytest.mark.parametrize(
    ("compare", "same"), [("normalized", [True, True, True, False]), ("bytes", [True, False, False, False])]
)
def test_exact_is_normalized_or_bytes(compare: str, same: list[bool]) -> None:
    text = "Caf\u00e9 au lait,\n please"
    others = [text, "caf\u00e9  AU lait, please ", "cafe\u0301 au lait, please", "cafe au lait, please"]
    hashes = selection(exact={"compare": compare}).sign([text, *others]).exact
    assert [bool((row == hashes[0]).all()) for row in hashes[1:]] == same


def test_normalize_is_what_is_kept_and_counted_as_changed() -> None:
    texts = ["cafe\u0301 \ufb01ne", "plain"]
    found = {form: selection(normalize=form, length={"min_words": 1}).judge(texts) for form in ("none", "nfc", "nfkc")}
    assert [found[form][0].text for form in found] == [texts[0], "caf\u00e9 \ufb01ne", "caf\u00e9 fine"]
    assert [[verdict.changed for verdict in verdicts] for verdicts in found.values()] == [
        [False, False],
        [True, False],
        [True, False],
    ]


def test_fingerprints_tell_apart_whatever_decides(tmp_path: Path) -> None:
    questions = tmp_path / "q.txt"
    questions.write_text(page(1))
    sections = [{"near": {}}, {"near": {"threshold": 0.8}}, {"near": {}, "normalize": "nfc"}]
    with_file = {"near": {}, "contamination": {"files": [str(questions)]}}
    prints = [selection(**one).fingerprint for one in (*sections, with_file)]
    questions.write_text(page(2))
    prints.append(selection(**with_file).fingerprint)
    assert len(set(prints)) == 5
    assert selection(near={"threshold": 0.75}).fingerprint == prints[0], "a default that is written out"


def test_fates_of_other_documents_are_refused() -> None:
    from pretrain.data.selection.fates import Fates

    with pytest.raises(ValueError, match="2 texts with fates of 1"):
        selection(near={}).judge(["a", "b"], Fates(np.zeros(1, Fates.DTYPE)))


def test_no_texts_are_no_verdicts() -> None:
    chosen = selection(**RULES, near={})
    assert chosen.judge([]) == [] and len(chosen.sign([])) == 0


WRONG = {
    "version: 1\nexact: {compare: normalised}\n": "exact.compare: must be 'normalized' or 'bytes', found 'normalised'",
    "version: 1\nnear: {treshold: 0.8}\n": "near.treshold: unknown key; did you mean near.threshold?",
    "version: 1\ngopher_quality: {min_stop_words: 9}\n": "gopher_quality.min_stop_words: 9 of 8 stop words",
    "version: 1\nnear: {bands: 20}\n": "near.bands: 20 do not divide near.permutations 128; give a divisor",
    "version: 1\nlength: {min_words: 9, max_words: 3}\n": "length.min_words: 9 is above max_words 3",
    "version: 1\n": "nothing is selected",
    "near: {}\n": "version: is missing",
    "version: 1\nlanguage: {keep: []}\n": "language.keep: is empty",
    "version: 1\nc4: {listed_words: nowhere.txt}\n": "nowhere.txt: cannot be read as a list of words",
    "version: 1\nduplicates: {}\n": "duplicates: unknown key",
    "- 1\n": "a configuration is a mapping of sections (version, normalize",
    "version: !!python/object:os.system 1\n": "is a tag",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_in_the_file_is_told_with_its_path_and_mend(text: str, tmp_path: Path) -> None:
    path = tmp_path / "select.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Selection.load(path)
    assert str(path) in str(caught.value) or "nowhere" in text
    assert WRONG[text] in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "select.yaml"
    path.write_text("version: 1\nnear: {bands: 20}\nlanguage: {keep: [en], least: 2.0}\nsome: {}\n")
    with pytest.raises(UserError) as caught:
        Selection.load(path)
    assert all(name in str(caught.value) for name in ("near.bands", "language.least", "some: unknown key"))
