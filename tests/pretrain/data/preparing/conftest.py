"""Texts that are cut into many pieces, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.data.preparing.options import Options
from tests.pretrain.data.corpus import hashes, quietly, stdlib_texts
from tests.pretrain.data.preparing.works import OPTIONS


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of JSON and paragraphs in files that are cut, and small files: 26 pieces."""
    folder = tmp_path_factory.mktemp("texts")
    modules = stdlib_texts(30, 2_000, 9_000)
    lines = [line for text in modules for line in text.split("\n\n")]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines[:400], "", "\u2581"]))
    (folder / "b.txt").write_text("\n\n".join(lines[400:900]))
    for number, text in enumerate(modules[:9]):
        (folder / f"c{number}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def options(model_file: Path) -> Options:
    return Options(tokenizer=model_file, **OPTIONS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected(texts: Path, model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what one process writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    quietly([texts], out, tokenizer=model_file, **OPTIONS)
    found = hashes(out)
    assert len([name for name in found if name.endswith(".tar")]) >= 6
    return found
