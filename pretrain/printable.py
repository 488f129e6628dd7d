"""Text from elsewhere on a terminal: it may hold a terminal's commands, which would move, hide or overwrite what is shown."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """The text with every character that is not printable, but for those in `keep`, as an escape: \\x1b, \\u202e, \\n."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
