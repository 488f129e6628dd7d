"""Which format of elsewhere a file has, and which part of a data set: both by its name alone.

    *.tar, *.tar.gz, *.tgz, *.tar.zst    webdataset: samples of members that share a name
    *.parquet                            a table with a column of texts
    *.idx with *.bin beside it           Megatron-LM: documents of token ids

Hugging Face lays a data set out as `data/train-00000-of-00010.parquet`, `train.jsonl` or `validation/0.jsonl.zst`. In a folder
such files go where their name says: train files to training, validation files to validation, test files nowhere. All other
files, and each file that is named itself, are divided by the hash of their documents.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

WEBDATASET, PARQUET, MEGATRON = "webdataset", "parquet", "megatron"
TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
DIVIDED = (*TARS, ".parquet", *(line + packed for line in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst")))
NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PART_OF = {name: part for part, names in NAMES.items() for name in names}
FILE = re.compile(rf"({'|'.join(PART_OF)})(-\d+(-of-\d+)?)?")  # without its suffixes


def kind_of(path: Path) -> str | None:
    """The foreign format of a file, or None: text."""
    name = path.name.lower()
    if name.endswith(TARS):
        return WEBDATASET
    if name.endswith(".parquet"):
        return PARQUET
    if path.suffix == ".idx" or (path.suffix == ".bin" and index_of(path).is_file()):
        return MEGATRON
    return None


def is_listed(path: Path) -> bool:
    """Whether a file inside a folder is one to read: of Megatron-LM's two the .idx, where both are there."""
    kind = kind_of(path)
    if kind == MEGATRON:
        return path.suffix == ".idx" and path.with_suffix(".bin").is_file()
    return kind is not None


def index_of(path: Path) -> Path:
    """Megatron-LM's index of what the user named: itself, its .bin, or the name that both share."""
    return path if path.suffix == ".idx" else Path(f"{str(path).removesuffix('.bin')}.idx")


def part_of_name(inner: str) -> str | None:
    """The part of a data set that a file belongs to, by its path inside the folder; None: its name does not say."""
    path = PurePosixPath(inner)
    suffix = next((suffix for suffix in DIVIDED if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        return None
    found = FILE.fullmatch(path.name.lower().removesuffix(suffix))
    names = [*path.parent.parts[: 1 + (path.parts[0] == "data")], found[1] if found else ""]
    return next((PART_OF[name.lower()] for name in names if name.lower() in PART_OF), None)
