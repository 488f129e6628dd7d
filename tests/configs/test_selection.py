"""The shipped selections: each opens, and keeps good pages alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.data.selection.select import Selection
from tests.distributed import REPOSITORY
from tests.pretrain.data.selection.making import changed, judged, page, words

FILES = sorted((REPOSITORY / "configs/selection").glob("*.yaml"))
ENGLISH = (
    "The old mill stood by the river for two hundred years before anybody thought of asking who had built it.",
    "Its wheel had not turned since the war, and the swallows that nested under the eaves had the place to themselves.",
    "Then one spring a teacher from the village found a ledger in the attic, with names and sums in a careful hand.",
    "She read it to her class on Friday afternoons, and the children began to draw the people that they heard of.",
)
OTHERS = (
    "A ship that leaves the harbour at low tide has to follow the buoys with care, for the channel is narrow there.",
    "Nobody on board slept that night, because the wind had turned and the ropes were singing with every wave.",
    "In the morning the captain wrote three lines in the log, closed it, and asked the cook to make more coffee.",
    "What they brought home was not the cargo that they had been sent for, and yet it made all of them rich.",
)


def test_there_are_some() -> None:
    assert {path.stem for path in FILES} == {"web", "copies"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_selection_opens_and_drops_copies(path: Path, tmp_path: Path) -> None:
    chosen, text = Selection.load(path), " ".join(ENGLISH)
    texts = [text, text.upper(), changed(text, 1, every=200), " ".join(OTHERS)]
    reasons = [verdict.reason for verdict in judged(chosen, [texts], tmp_path / "all")[0]]
    assert reasons == ["", "exact duplicate", "near duplicate", ""]


def test_web_keeps_english_pages_alone(tmp_path: Path) -> None:
    chosen = Selection.load(REPOSITORY / "configs/selection/web.yaml")
    texts = ["Buy now! " * 100, " ".join(words(1, 200)), "Home\nAbout\n" + "\n".join(ENGLISH), page(2, 20)]
    verdicts = judged(chosen, [texts], tmp_path / "all")[0]
    assert [verdict.text for verdict in verdicts] == [None, None, "\n".join(ENGLISH), None]
    assert verdicts[3].reason == "Gopher: words" and verdicts[2].changed
