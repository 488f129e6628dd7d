"""A small labelled set that every machine can make: first sentences of docstrings in the standard library, and from which of
its packages each is. For demonstrations where no other data are at hand.

    python -m pretrain.finetuning.stdlib DIR      # writes DIR/train.tsv and DIR/dev.tsv
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import xxhash

PACKAGES = ("asyncio", "email", "tkinter", "unittest", "xml", "distutils", "multiprocessing", "idlelib")
HELD_OUT = 5  # every so-manieth, by its hash


def sentences(package: Path) -> Iterator[str]:
    """First lines of the docstrings of a package's classes and functions."""
    for path in sorted(package.rglob("*.py")):
        if "test" in path.parts or path.name.startswith("test_"):
            continue
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                line = " ".join((ast.get_docstring(node) or "").strip().split("\n\n")[0].split())
                if 4 <= len(line.split()) <= 60:
                    yield line


def write(folder: Path) -> tuple[int, int]:
    """Write both files; returns their numbers of rows."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows = {(name, line) for name in PACKAGES if (library / name).is_dir() for line in sentences(library / name)}
    ordered = sorted(rows, key=lambda row: xxhash.xxh64_intdigest("\t".join(row).encode()))
    parts = {"dev": ordered[::HELD_OUT], "train": [row for place, row in enumerate(ordered) if place % HELD_OUT]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (folder / f"{name}.tsv").write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in part))
    return len(parts["train"]), len(parts["dev"])


if __name__ == "__main__":
    train, dev = write(Path(sys.argv[1]))
    print(f"{train:,} training and {dev:,} held-out sentences of docstrings, by package")
