from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.data.selection.c4 import num_sentences
from pretrain.data.selection.config import C4
from pretrain.data.selection.words import Texts
from pretrain.errors import UserError
from tests.pretrain.data.selection.making import selection

OFF: dict[str, Any] = {
    **dict.fromkeys(("end_marks", "min_line_words", "max_line_word", "min_sentences")),
    **dict.fromkeys(("javascript", "policies", "citations", "lorem_ipsum", "curly_brackets"), False),
}
GOOD = "This line says enough to be kept.\nSo does this one, does it not?\nAnd here is the last one!"


def kept(text: str, **rules: Any) -> str | None:
    [verdict] = selection(c4={**OFF, **rules}).judge([text])
    assert verdict.changed == (verdict.text is not None and verdict.text != text)
    return verdict.text


def reason(text: str, **rules: Any) -> str:
    return selection(c4={**OFF, **rules}).judge([text])[0].reason


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ({"end_marks": ".!?"}, "Home | About | Contact"),
        ({"end_marks": ".!?"}, "Read more..."),
        ({"min_line_words": 5}, "Only four words here."),
        ({"max_line_word": 10}, "A word of elevenchars is too long."),
        ({"javascript": True}, "Please turn JavaScript on, dear reader."),
        ({"policies": True}, "By reading you accept our Privacy Policy in whole."),
    ],
)
def test_lines_go_and_what_is_left_is_the_text(rules: dict[str, Any], line: str) -> None:
    assert kept(f"{line}\n{GOOD}\n  {line}  ", **rules) == GOOD
    assert kept(f"{line}\n{GOOD}") == f"{line}\n{GOOD}", "without the rule it stays"


def test_numbers_of_a_line_at_below_and_above() -> None:
    line = "Exactly five words are here."
    assert [kept(line, min_line_words=count) for count in (4, 5, 6)] == [line, line, None]
    assert [kept(line, max_line_word=count) for count in (8, 7, 6)] == [line, line, None]


def test_citations_go_out_of_lines() -> None:
    text = "A claim[1] that [citation needed] is made.[edit] And [two] more[] stay."
    assert kept(text, citations=True) == "A claim that  is made. And [two] more stay."


@pytest.mark.parametrize(
    ("rules", "text", "told"),
    [
        ({"lorem_ipsum": True}, f"{GOOD}\nLorem Ipsum dolor", "lorem ipsum"),
        ({"curly_brackets": True}, f"{GOOD}\nif (x) {{", "curly brackets"),
        ({"min_sentences": 4}, GOOD, "sentences that are left"),
        ({"end_marks": "."}, "No line of this\nends as it should", "lines that are left"),
    ],
)
def test_pages_go(rules: dict[str, Any], text: str, told: str) -> None:
    assert reason(text, **rules) == f"C4: {told}"
    assert reason(text) == ""


def test_sentences_at_below_and_above() -> None:
    assert [reason(GOOD, min_sentences=count) != "" for count in (2, 3, 4)] == [False, False, True]


def test_sentences_are_ends_and_what_closes_behind_them() -> None:
    texts = [
        'He said: "Go." (Really?) 3.5 is one!?',
        "no end here",
        "\u672c\u5f53\u3002 \u306f\u3044\uff01",
        '.") ""',
        "",
    ]
    assert num_sentences([], Texts(texts)).tolist() == [3, 0, 2, 1, 0]


def test_sentences_are_counted_of_what_is_left() -> None:
    text = f"{GOOD}\nShort. Short. Short."
    assert reason(text, min_line_words=5, min_sentences=4) == "C4: sentences that are left"


def test_listed_words_whole_and_phrases(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("bad\nvery ugly\nna\u00efve\n\n")
    for text, hit in [
        ("a Bad, word", True),
        ("badly baden", False),
        ("VERY -- ugly!", True),
        ("ugly very", False),
        ("so NA\u00cfVE", True),
        ("very", False),
    ]:
        assert reason(text, listed_words=str(path)) == ("C4: listed words" if hit else ""), text


def test_a_list_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a list of words"):
        selection(c4={"listed_words": str(tmp_path / "none.txt")})
    (tmp_path / "empty.txt").write_text("\n--\n")
    with pytest.raises(UserError, match="holds no words"):
        selection(c4={"listed_words": str(tmp_path / "empty.txt")})


def test_numbers_are_the_papers() -> None:
    config = C4()
    assert (config.min_line_words, config.min_sentences, config.max_line_word) == (5, 3, 1000)
    assert all((config.javascript, config.lorem_ipsum, config.curly_brackets, config.policies, config.citations))
