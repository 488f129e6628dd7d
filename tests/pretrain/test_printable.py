"""Nothing that a terminal would obey comes through."""

from __future__ import annotations

import pytest

from pretrain.printable import printable

ESCAPED = {
    "plain words, naïve 中文 \U0001f680": "plain words, naïve 中文 \U0001f680",
    "\x1b[2Jgone": "\\x1b[2Jgone",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b31m": "\\x9b31m",  # the one-byte CSI
    "a\rb\x08\x00": "a\\rb\\x08\\x00",
    "abc\u202edcba": "abc\\u202edcba",  # reads from right to left from here on
    "\ud800": "\\ud800",
    "line\n\tnext": "line\\n\\tnext",
}


@pytest.mark.parametrize(("text", "shown"), ESCAPED.items())
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_some_may_be_kept() -> None:
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
