"""What the tests of prepare's work share: options that make many pieces, and where the work lies."""

from __future__ import annotations

from pathlib import Path

PIECES = 26
OPTIONS = {
    "validation": 0.2,
    "tokens_per_chunk": 1024,
    "chunks_per_shard": 7,
    "piece_bytes": 10_000,
    "split": "blank-line",
}


def silent(_: str) -> None:
    pass


def draft_of(out: Path) -> Path:
    return out.parent / f".{out.name}.preparing"


def results(out: Path) -> dict[Path, int]:
    """Pieces and shards that are done, and when each was."""
    work, times = draft_of(out) / "work", dict[Path, int]()
    for stage in ("encode", "train", "validation"):
        for path in work.glob(f"{stage}/0*.json"):
            wrote = (
                draft_of(out) / stage / f"shard-{path.stem[1:]}.tar"
                if stage != "encode"
                else path.with_suffix(".train")
            )
            times |= {one: one.stat().st_mtime_ns for one in (path, wrote)}
    return times
