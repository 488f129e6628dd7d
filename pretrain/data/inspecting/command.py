"""`inspect` of data: which question is asked, of which sources."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from pretrain.config.load import load_config
from pretrain.config.run import Config
from pretrain.data.inspecting.samples import Row, Speller, legend, plain_row, tell_row
from pretrain.data.inspecting.telling import bar, tell_source
from pretrain.data.inspecting.verifying import verify
from pretrain.data.manifest import Manifest
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.printable import printable

if TYPE_CHECKING:
    from pretrain.data.sources import Sources

SEQ_LENGTH, SEED = 256, 1  # of samples without a config


def main(path: Path | str, args: Namespace, console: Console) -> int:
    """path: a folder of shards, its address, or a config file. Returns 1 where shards are not what they should be."""
    _check(path, args)
    config = _config(path, args)
    if args.verify:
        return _verify(_folders(path, config), args.json, console)
    if args.sample:
        value: Any = list(_samples(path, config, args, console))
    elif config is not None:
        value = _sources(config, args.json, console)
    else:
        value = tell_source(Manifest.load(path), console, args.json)
    if args.json:
        json.dump(value, sys.stdout)
        print()
    return 0


def is_config(path: Path | str) -> bool:
    return isinstance(path, Path) and path.is_file()


def _check(path: Path | str, args: Namespace) -> None:
    """Raises UserError where options do not go together."""
    configured = args.config is not None or is_config(path)
    for name in ("seq_length", "seed"):
        option = f"--{name.replace('_', '-')}"
        if getattr(args, name) is not None and (configured or not args.sample):
            why = "the config says it" if configured else "it is of --sample"
            raise UserError(f"{option}: has no effect here: {why}; leave it out")
    if args.config is not None and is_config(path):
        raise UserError(f"--config: {path} is a config itself; name a folder of shards, or leave --config out")
    if args.config is not None and not args.sample:
        raise UserError("--config: is of --sample; or name the config file alone, which tells of its own data")
    if args.verify and args.sample:
        raise UserError("--verify: reads all; ask for --sample by itself")
    if any(number < 0 for number in args.sample):
        raise UserError(f"--sample {min(args.sample)}: sample numbers begin at 0")


def _config(path: Path | str, args: Namespace) -> Config | None:
    """Of --config, with the folder of shards in the place of its data; or of the path itself."""
    if is_config(path):
        config = load_config(path)
    elif args.config is None:
        return None
    else:
        here = json.dumps(str(path))  # held-out data too: what is validated is not asked, but must be somewhere
        config = load_config(args.config, [f"data.train={here}", f"data.validation={here}", "data.weights=null"])
    if config.objective.is_task:
        raise UserError(
            f"objective.kind: {config.objective.kind} learns from labelled examples; inspect tells of prepared text and pairs"
        )
    return config


def _folders(path: Path | str, config: Config | None) -> list[Path | str]:
    if config is None or not is_config(path):
        return [path]
    held_out = [] if config.data.validation is None else [config.data.validation]
    return [*config.data.train_folders, *held_out, *config.data.held_out.values()]


# -- all of it -------------------------------------------------------------------------------------------------------


def _verify(folders: Sequence[Path | str], as_json: bool, console: Console) -> int:
    """Name what is wrong, as it is found."""
    problems: list[str] = []
    for folder in folders:
        manifest = Manifest.load(folder)
        size = sum(shard.bytes for shard in manifest.shards)
        found = 0
        with bar(f"Reading {printable(str(folder))}", size) as tell:
            for problem in verify(manifest, tell):
                found += 1
                problems.append(problem)
                if not as_json:
                    console.print(printable(problem))
        if not found and not as_json:
            what = f"{len(manifest.shards):,} shards, {manifest.chunks:,} chunks, {size:,} bytes"
            console.print(f"{printable(str(folder))}: {what} are what was written.")
    if as_json:
        json.dump({"folders": [str(folder) for folder in folders], "problems": problems}, sys.stdout)
        print()
    return 1 if problems else 0


def _sources(config: Config, as_json: bool, console: Console) -> dict[str, Any]:
    """Of each of a config's sources its share of the run, and what is in it."""
    from pretrain.data.inspecting.mixture import shares_of, tell_shares

    with _opened(config) as sources:
        shares = shares_of(config, sources)
        if not as_json:
            tell_shares(shares, console)
        manifests = [*_train(sources).manifests, *(sources.validation.manifests if sources.validation else [])]
    return {
        "shares": [share.described() for share in shares],
        "sources": [tell_source(manifest, console, as_json) for manifest in manifests],
    }


# -- samples ---------------------------------------------------------------------------------------------------------


def _samples(path: Path | str, config: Config | None, args: Namespace, console: Console) -> Iterator[dict[str, Any]]:
    if config is None:
        packed, seed = Manifest.load(path).packing.row, SEED if args.seed is None else args.seed
        length = args.seq_length or (packed if packed > 1 else SEQ_LENGTH)
        with closing(Stream([path], length, seed)) as stream:
            tokenizer = stream.manifests[0].tokenizer()
            names = {index: f"[{role.upper()}]" for role, index in tokenizer.special.items()}
            for number in args.sample:
                tokens = stream.read(np.array([number], np.int64))[0, :-1]
                row = plain_row(tokens, stream.eos, packed > 1)
                yield _sample(stream, number, seed, [row], Speller(tokenizer, names), args.json, console)
        return
    from pretrain.data.inspecting.seen import names_of, rows_of, stream_of

    with _opened(config) as sources:
        speller = Speller(sources.tokenizer, names_of(sources.vocabulary))
        for number in args.sample:
            rows = rows_of(config, sources, number)
            yield _sample(stream_of(sources, number), number, config.data_seed, rows, speller, args.json, console)


def _sample(
    stream: Stream, number: int, seed: int, rows: Sequence[Row], speller: Speller, as_json: bool, console: Console
) -> dict[str, Any]:
    """Where it lies, and what it is; also as the JSON value."""
    found = stream.explain(number)
    if not as_json:
        epoch = "" if found["epoch"] is None else f"epoch {found['epoch']}, "
        place = f"{found['shard']}, chunk {found['chunk']}, token {found['first_token']:,}"
        console.print(f"sample {number} of seed {seed}: {epoch}source {printable(found['source'])}, {place}")
        legend({mark for row in rows for mark in row.marks}, console)
        for row in rows:
            if len(rows) > 1:
                console.print(f"=== {row.name}")
            tell_row(row, speller, console)
    return {**found, "seed": seed, "rows": [_described(row) for row in rows]}


def _described(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "tokens": row.tokens.tolist(),
        "shown": row.shown.tolist(),
        "marks": row.marks,
        "documents": row.documents.tolist(),
        "positions_begin_anew": row.begins_anew,
        **({} if row.segments is None else {"segments": row.segments.tolist()}),
    }


# -- a config's data -------------------------------------------------------------------------------------------------


@contextmanager
def _opened(config: Config) -> Iterator[Sources]:
    """The sources of a config, which are closed on leaving."""
    from pretrain.data.sources import Sources  # with torch, which shards do without
    from pretrain.inherit import with_initial

    sources = Sources.open(with_initial(config))
    try:
        yield sources
    finally:
        for stream in (*sources.phases, *([sources.validation] if sources.validation else [])):
            stream.close()


def _train(sources: Sources) -> Stream:
    assert isinstance(sources.train, Stream)  # a task was refused
    return sources.train
