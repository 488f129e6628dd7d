"""Texts that were made to hurt: each costs time that grows as they do, and bounded memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data.selection import select
from pretrain.data.selection.config import GopherRepetition
from pretrain.data.selection.select import Selection
from tests.pretrain.data.selection.making import page, selection

TEXTS: dict[str, Callable[[int], str]] = {
    "one word": lambda size: "x" * size,
    "one line": lambda size: "word " * (size // 5),
    "spaces": lambda size: " " * size,
    "no words": lambda size: ".,;" * (size // 3),
    "zero bytes": lambda size: "\0" * size,
    "lines": lambda size: "\n" * size,
    "lines of a sign": lambda size: "a\n" * (size // 2),
    "dots": lambda size: "." * (size - 1) + "x",
    "quotes behind dots": lambda size: '."' * (size // 2),
    "open brackets": lambda size: "[" * size,
    "digits in brackets": lambda size: "[1" * (size // 2),
    "citation without an end": lambda size: "[" + "1" * (size - 1),
    "half surrogates": lambda size: "\ud800 " * (size // 2),
    "accents": lambda size: "a" + "\u0301" * (size - 1),
    "words of a letter, all different order": lambda size: " ".join(
        chr(97 + place * place % 26) for place in range(size // 2)
    ),
    "sharp s that grows": lambda size: "\u0130 " * (size // 2),
    "beyond all planes": lambda size: "\U0010ffff " * (size // 2),
}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    """All rules on, at bounds that nearly nothing breaks, so that all of them look."""
    listed = tmp_path_factory.mktemp("listed") / "words.txt"
    listed.write_text("bad\nvery bad phrase\n")
    questions = listed.with_name("questions.txt")
    questions.write_text(page(1))
    return selection(
        exact={},
        near={},
        length={"min_words": 0, "min_characters": 0},
        language={"keep": ["en"], "least": 0.0},
        gopher_repetition=dict.fromkeys(GopherRepetition.model_fields, 1.0),
        gopher_quality={
            "min_words": 0,
            "max_words": 10**8,
            "min_word_length": 0.0,
            "max_word_length": 1e9,
            "max_hashes": 1e9,
            "max_ellipses": 1e9,
            "max_bullet_lines": 1.0,
            "max_ellipsis_lines": 1.0,
            "min_alphabetic_words": 0.0,
            "min_stop_words": 0,
        },
        c4={"listed_words": str(listed), "min_sentences": 0},
        contamination={"files": [str(questions)]},
    )


def seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


@pytest.mark.parametrize("kind", TEXTS)
def test_time_grows_as_the_text_does(kind: str, chosen: Selection) -> None:
    """Eight times the text, at most 24 times the time: what is quadratic takes 64 times. Both stages."""
    small, large = TEXTS[kind](1 << 15), TEXTS[kind](1 << 18)

    def both(text: str) -> None:
        chosen.sign([text])
        chosen.judge([text])

    both(small)
    before = min(seconds(lambda: both(small)) for _ in range(3))
    assert seconds(lambda: both(large)) < 24 * max(before, 0.02)


@pytest.mark.parametrize("kind", TEXTS)
def test_every_text_has_one_verdict(kind: str, chosen: Selection) -> None:
    [verdict] = chosen.judge([TEXTS[kind](1000)])
    assert (verdict.text is None) == bool(verdict.reason) and len(verdict.mark) == 16
    assert len(chosen.sign([TEXTS[kind](1000)])) == 1


def test_ten_megabytes_in_a_line_and_a_million_lines(chosen: Selection) -> None:
    """Within seconds and 1.5 GiB: rules look at the first 4 Mi characters."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in ("one line", "lines of a sign"):
        text = TEXTS[kind](10_000_000 if kind != "lines of a sign" else 2_000_000)
        assert seconds(lambda text=text: chosen.judge([text])) < 30  # type: ignore[misc]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000


def test_rules_look_at_a_window_and_the_text_is_kept_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(select, "WINDOW", 1000)
    chosen = selection(gopher_quality={}, near={})
    text = page(1, 400) + "\n" + "# " * 3000
    [verdict] = chosen.judge([text])
    assert verdict.text == text
    assert (chosen.sign([text]).sketches == chosen.sign([text[:1000]]).sketches).all()
