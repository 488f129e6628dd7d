"""Pairs that every machine can make, to try sequence to sequence without a corpus.

python -m pretrain.data.made reversals OUT.tsv     # letters, and the same backwards
python -m pretrain.data.made docstrings OUT.tsv    # what a function of the standard library does, and its name
"""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.errors import UserError

REVERSALS = 12_000
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def reversals() -> Iterator[tuple[str, str]]:
    """Different rows of 3 to 10 letters, and each row backwards; always the same."""
    draw = random.Random(1)
    known: set[tuple[str, ...]] = set()
    while len(known) < REVERSALS:
        letters = tuple(draw.choice(LETTERS) for _ in range(draw.randint(3, 10)))
        if letters not in known:
            known.add(letters)
            yield " ".join(letters), " ".join(reversed(letters))


def docstrings() -> Iterator[tuple[str, str]]:
    """First sentences of docstrings, and the words of their functions' names; each pair once, in the order of the files."""
    known: set[tuple[str, str]] = set()
    for path in _sources():
        for name, text in _functions(path):
            pair = text, " ".join(name.lower().split("_"))
            if pair not in known:
                known.add(pair)
                yield pair


def _sources() -> Iterator[Path]:
    """The standard library's modules, without tests and what pip put beside them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library).parts
        if not {"test", "tests", "idle_test", "site-packages", "lib2to3"} & set(inside):
            yield path


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()).split(". ")[0]
        name = node.name.strip("_")
        if 3 <= len(text.split()) <= 40 and not node.name.startswith("__") and name:
            yield name, text


MADE: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {"reversals": reversals, "docstrings": docstrings}


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in MADE:
        raise UserError(f"usage: python -m pretrain.data.made {'|'.join(MADE)} OUT.tsv")
    rows = [f"{source}\t{target}\n" for source, target in MADE[arguments[0]]()]
    Path(arguments[1]).write_text("".join(rows), "utf-8")
    print(f"{arguments[1]}: {len(rows):,} pairs")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
