"""What a run or a folder of shards holds, for people: `python -m pretrain inspect`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain.config.folder import CONFIG
from pretrain.data import manifest as manifests
from pretrain.data.manifest import Manifest
from pretrain.data.stream import Stream
from pretrain.errors import UserError
from pretrain.finetuning.opening import run_labels, task_of
from pretrain.metrics import read_metrics
from pretrain.runs import run_config, run_tokenizer
from pretrain.sizes import Sizes, parameters_of
from pretrain.vocabulary import vocabulary_of

SEQ_LENGTH = 256  # of a sample, where the folder has no rows


def main(args: Namespace) -> int:
    """Tell of a run's folder or of a folder of shards, whichever it is. Raises UserError where it is neither."""
    path, console = Path(args.path), Console(highlight=False, markup=False, soft_wrap=True)
    if (path / manifests.NAME).is_file():
        return _data(path, args, console)
    if (path / CONFIG).is_file():
        if args.sample is not None:
            raise UserError(f"--sample: {path} is a run's folder; name a folder of shards, such as shards/train")
        return _run(path, console)
    parts = [str(part.parent) for part in sorted(path.glob(f"*/{manifests.NAME}"))]
    hint = f"; there are shards in {', '.join(parts)}" if parts else ""
    raise UserError(f"{path}: neither a run's folder ({CONFIG}) nor a folder of shards ({manifests.NAME}){hint}")


# -- shards ----------------------------------------------------------------------------------------------------------


def _data(path: Path, args: Namespace, console: Console) -> int:
    if args.sample is not None:
        _sample(path, args, console)
        return 0
    manifest = Manifest.load(path)
    table = _two_columns(str(path))
    for name, value in _facts(manifest):
        table.add_row(name, value)
    console.print(table)
    return 0


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "documents", f"{manifest.documents:,}"
    yield "tokens", f"{manifest.tokens:,} ({manifest.dtype.name})"
    filler = f", {manifest.padding / manifest.tokens:.2%} of them filler" if manifest.packing.row > 1 else ""
    yield "packing", f"{manifest.packing}{filler}"
    yield "bytes of text", f"{manifest.text_bytes:,} ({manifest.text_bytes / manifest.tokens:.2f} per token)"
    yield "vocabulary", f"{manifest.vocab_size:,}"
    yield "special ids", ", ".join(f"{name} {index}" for name, index in manifest.special.items())
    yield "shards", f"{len(manifest.shards)} of {manifest.chunks} chunks, {manifest.tokens_per_chunk:,} tokens each"
    yield "tokenizer", f"SHA-256 {manifest.tokenizer_sha256[:16]}"
    yield "manifest", f"SHA-256 {manifest.fingerprint[:16]}"


def _sample(path: Path, args: Namespace, console: Console) -> None:
    """One training sequence, as the model will see it."""
    if args.sample < 0:
        raise UserError(f"--sample {args.sample}: sample numbers begin at 0")
    row = Manifest.load(path).packing.row
    stream = Stream([path], args.seq_length or (row if row > 1 else SEQ_LENGTH), args.seed)
    found = stream.explain(args.sample)
    stream.close()
    place = f"{found['shard']}, chunk {found['chunk']}, token {found['first_token']:,}"
    console.print(f"sample {args.sample} of seed {args.seed}: epoch {found['epoch']}, {place}")
    for number, text in enumerate(found["documents"], start=1):
        console.print(f"--- document {number} of {len(found['documents'])}")
        console.print(text)


# -- runs ------------------------------------------------------------------------------------------------------------


def _run(path: Path, console: Console) -> int:
    from pretrain import checkpoint  # imports torch, which shards do without

    config, tokenizer = run_config(path), run_tokenizer(path)
    vocabulary = vocabulary_of(config, tokenizer)
    shape = Sizes(vocabulary.size)
    if config.objective.is_task:
        task = task_of(config, tokenizer, vocabulary, run_labels(path))
        shape = Sizes(vocabulary.size, task.num_outputs, task.num_rows)
    count = parameters_of(config, shape)
    console.print(f"{path}: {config.model.kind}, {count:,} parameters, {config.precision.compute}, {_last(path)}")
    table = Table("step", "validation loss", "size", "written by", "hashes")
    losses = {line["step"]: line.get("validation_loss") for line in read_metrics(path)}
    damaged: list[str] = []
    for step in checkpoint.list_steps(path):
        loss = "" if losses.get(step) is None else f"{losses[step]:.4f}"
        try:
            found = checkpoint.open_checkpoint(checkpoint.folder_of(path, step))
        except UserError as error:
            damaged.append(f"step {step:,}: {error}")
            table.add_row(f"{step:,}", loss, "", "", "damaged")
            continue
        writer, size = str(found.about.get("layout")), f"{found.bytes / 2**20:,.1f} MiB"
        table.add_row(f"{step:,}", loss, size, writer, f"{len(found.files)} match")
    console.print(table)
    console.print(*damaged, sep="\n", end="\n" if damaged else "")
    return 1 if damaged else 0


def _last(path: Path) -> str:
    lines = [line for line in read_metrics(path) if line.get("loss") is not None]
    return f"step {lines[-1]['step']:,}, loss {lines[-1]['loss']:.4f}" if lines else "no step logged yet"


def _two_columns(title: str) -> Table:
    return Table("", "", title=title, show_header=False)
